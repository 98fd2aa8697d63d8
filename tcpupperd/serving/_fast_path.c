/* The fast path of fast_path.py in C: the same result for the same bytes.
 *
 * `bytes.upper` goes byte by byte, and each line costs Python several more calls and objects.
 * Here, complete lines are received, upper-cased, counted and sent without any allocation, and
 * the GIL is released once for both system calls.
 */
#define _GNU_SOURCE /* memrchr(3) */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000 /* one binary for Python 3.11 and later */
#include <Python.h>

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The newlines of one block are counted in a single byte: a wider counter would make the compiler
 * widen each vector of bytes into several vectors of counters. */
enum { RECEIVE_SIZE = 126976, HELD_MAX = 4096, BLOCK = 240 };

/* The ledger of a worker (ledger.py). It survives the worker, so the order of the writes matters:
 * hence `volatile`. */
struct ledger {
    volatile uint64_t pass;    /* its number in the upper half, the descriptor in the lower one */
    volatile int64_t received; /* in this pass; UNKNOWN until recv(2) has returned */
    uint64_t numbers[2];       /* of ledger.py */
    volatile uint64_t sent;    /* whether a process has sent the signal that kills this one */
    uint8_t unused[4096 - 40];
    uint8_t held[HELD_MAX];
    uint8_t data[RECEIVE_SIZE];
    struct row {
        volatile uint64_t number; /* of the last pass that was noted, and flags */
        volatile uint64_t lines; /* below the number of the last pass that left nothing */
        uint64_t unused[2];
    } rows[];
};

struct record {
    int64_t offset;
    double last_activity, line_began, lingers_until;
    uint64_t lines;
    uint32_t unsent, held;
    uint16_t words, flags;
    uint8_t body[76];
};

enum { UNKNOWN = -1, LINES_BITS = 40, MID_LINE = 1 };
static const uint64_t NO_CONNECTION = UINT32_MAX, LINES = (UINT64_C(1) << LINES_BITS) - 1,
                      KNOWN = UINT64_C(1) << 63, RECORD = UINT64_C(1) << 62,
                      SECOND = UINT64_C(1) << 61, OWES = UINT64_C(1) << 60,
                      FACTS = UINT64_C(1) << 59, FAST = UINT64_C(1) << 58;

static struct ledger *ledger;
static size_t rows;

static void begin(int fd)
{
    ledger->received = UNKNOWN;
    ledger->pass = ((ledger->pass >> 32) + 1) << 32 | (uint32_t)fd;
}

static void received(ssize_t size)
{
    if (size < 0)
        ledger->pass |= NO_CONNECTION;
    else
        ledger->received = size;
}

/* Note the end of a pass that left this much of an incomplete line, if that is simple: not if the
 * line began earlier. ledger.py does the rest. */
static void note(int fd, const uint8_t *held, size_t size, uint64_t lines)
{
    if (fd < 0 || (size_t)fd >= rows)
        return;
    struct row *row = &ledger->rows[fd];
    struct record *records = (struct record *)(ledger->rows + rows);
    if (size > 0 && (row->number & FACTS || size > sizeof records->body))
        return;
    if (row->number & OWES && (size == 0 || lines == 0))
        return;
    uint64_t number = ledger->pass >> 32, second = ~row->number & SECOND;
    lines = (row->lines + lines) & LINES;
    if (size > 0) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        struct record *record = &records[2 * fd + (second ? 1 : 0)];
        *record = (struct record){.line_began = (double)now.tv_sec + (double)now.tv_nsec * 1e-9,
                                  .lines = lines, .held = (uint32_t)size, .flags = MID_LINE};
        memcpy(record->body, held, size);
        row->number = KNOWN | RECORD | OWES | FAST | second | number;
    }
    row->lines = number << LINES_BITS | lines;
}

struct pass {
    ssize_t held;     /* bytes of the answer to an incomplete line, before what is received */
    ssize_t received;
    ssize_t end;      /* of the last complete line, including what was held; 0 if there is none */
    ssize_t sent;
    uint64_t lines;
    int error;        /* errno of the last system call */
};

/* Upper-case ASCII letters in place and return the number of newlines. The inner loop has no
 * branch, so that GCC and Clang vectorise it. */
static uint64_t upper(uint8_t *data, size_t size)
{
    uint64_t lines = 0;
    while (size > 0) {
        size_t length = size < BLOCK ? size : BLOCK;
        uint8_t found = 0;
        for (size_t i = 0; i < length; i++) {
            uint8_t byte = data[i];
            found += byte == '\n';
            data[i] = byte ^ ((uint8_t)(byte - 'a') < 26) << 5;
        }
        lines += found;
        data += length;
        size -= length;
    }
    return lines;
}

/* The part that runs without the GIL. */
static void answer(int fd, uint8_t *data, struct pass *pass)
{
    uint8_t *new = data + pass->held;
    if (ledger)
        begin(fd);
    pass->received = recv(fd, new, RECEIVE_SIZE, 0);
    if (ledger)
        received(pass->received);
    if (pass->received > 0) {
        uint8_t *last = memrchr(new, '\n', (size_t)pass->received);
        pass->lines = upper(new, (size_t)pass->received);
        if (last) {
            pass->end = last + 1 - data;
            pass->sent = send(fd, data, (size_t)pass->end, MSG_NOSIGNAL);
        }
    }
    pass->error = errno;
}

/* Add to a count, which need not be aligned; return whether it has room for the sum. */
static int add(char *count, uint64_t number)
{
    uint64_t before;
    memcpy(&before, count, sizeof before);
    uint64_t sum = before + number;
    if (sum < before) {
        PyErr_SetString(PyExc_OverflowError, "the count would exceed 64 bits");
        return 0;
    }
    memcpy(count, &sum, sizeof sum);
    return 1;
}

/* What the caller has to do with the rest. The buffer is copied before anything else, because
 * allocating a tuple may run finalizers (until Python 3.11), which may overwrite the buffer. */
static PyObject *rest(const uint8_t *data, const struct pass *pass)
{
    const char *sent = (const char *)data + pass->sent, *end = (const char *)data + pass->end;
    ssize_t unsent = pass->end - pass->sent, tail = pass->held + pass->received - pass->end;
    if (unsent == 0 && tail == 0)
        return Py_NewRef(Py_None);
    PyObject *incomplete = PyBytes_FromStringAndSize(end, tail);
    if (!incomplete || unsent == 0)
        return incomplete;
    PyObject *both = NULL, *answer = PyBytes_FromStringAndSize(sent, unsent);
    if (answer)
        both = PyTuple_Pack(2, answer, incomplete);
    Py_XDECREF(answer);
    Py_DECREF(incomplete);
    return both;
}

/* The buffer is per thread, because another thread may get here while the GIL is released. On the
 * stack, where overflow protection touches each of its pages, it would cost 4 % of a line. */
static PyObject *take(int fd, char *counts, const char *held, Py_ssize_t held_size)
{
    static _Thread_local uint8_t own[HELD_MAX + RECEIVE_SIZE];
    uint8_t *data = (ledger ? ledger->held : own) + HELD_MAX - held_size;
    struct pass pass;
    do {
        pass = (struct pass){.held = held_size};
        memcpy(data, held, (size_t)held_size);
        Py_BEGIN_ALLOW_THREADS
        answer(fd, data, &pass);
        Py_END_ALLOW_THREADS
        /* A signal handler may get here, too, and overwrite the buffer: so held is copied again. */
        if (pass.received < 0 && pass.error == EINTR && PyErr_CheckSignals() < 0)
            return NULL;
    } while (pass.received < 0 && pass.error == EINTR);
    errno = pass.error;
    if (pass.received < 0)
        return errno == EAGAIN ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(errno);
    if (pass.received == 0)
        return PyBytes_FromStringAndSize(NULL, 0);
    if (!add(counts, pass.lines))
        return NULL;
    /* If it was interrupted, send() has accepted nothing. A signal handler that ran here could
     * overwrite the buffer, so sending again is left to the caller. */
    if (pass.sent < 0 && pass.error != EAGAIN && pass.error != EINTR)
        return PyLong_FromLong(pass.error);
    if (pass.sent < 0)
        pass.sent = 0;
    if (!add(counts + sizeof(uint64_t), (uint64_t)pass.sent))
        return NULL;
    if (ledger && pass.end == pass.sent)
        note(fd, data + pass.end, (size_t)(pass.held + pass.received - pass.end), pass.lines);
    return rest(data, &pass);
}

static PyObject *fast_path(PyObject *module, PyObject *const *arguments, Py_ssize_t number)
{
    (void)module;
    if (number != 3) {
        PyErr_SetString(PyExc_TypeError, "fast_path() requires a descriptor, a buffer of two"
                        " counts and the answer so far");
        return NULL;
    }
    char *held;
    Py_ssize_t held_size;
    long fd = PyLong_AsLong(arguments[0]);
    if ((fd == -1 && PyErr_Occurred())
        || PyBytes_AsStringAndSize(arguments[2], &held, &held_size) < 0)
        return NULL;
    Py_buffer counts;
    if (PyObject_GetBuffer(arguments[1], &counts, PyBUF_CONTIG) < 0)
        return NULL;
    PyObject *result = NULL;
    if (counts.itemsize != sizeof(uint64_t) || counts.len < 2 * counts.itemsize)
        PyErr_SetString(PyExc_ValueError, "the buffer must hold two counts of 8 bytes each");
    else if (held_size > HELD_MAX)
        PyErr_SetString(PyExc_ValueError, "the answer so far must have at most 4096 bytes");
    else
        result = take(fd == (int)fd ? (int)fd : -1, counts.buf, held, held_size);
    PyBuffer_Release(&counts);
    return result;
}

/* Use the buffer and the rows of a ledger from now on; None for none. */
static PyObject *share(PyObject *module, PyObject *memory)
{
    static Py_buffer view;
    (void)module;
    if (ledger)
        PyBuffer_Release(&view);
    ledger = NULL;
    if (memory != Py_None) {
        if (PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE) < 0)
            return NULL;
        ledger = view.buf;
        rows = ((size_t)view.len - sizeof *ledger)
               / (sizeof *ledger->rows + 2 * sizeof(struct record));
    }
    return Py_NewRef(Py_None);
}

static pid_t worker;

/* Note whether a fatal signal was sent by another process, or is the fault of this one; then die.
 * Keepers, whose death says nothing about the worker, get here, too. */
static void die(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (ledger && getpid() == worker && info->si_code <= 0 && info->si_pid != worker)
        ledger->sent = 1;
    if (info->si_code <= 0)
        raise(number); /* otherwise, the instruction that failed is executed again */
}

static void note_signals(void)
{
    static const int numbers[] = {SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
    struct sigaction action = {.sa_sigaction = die, .sa_flags = SA_SIGINFO | (int)SA_RESETHAND};
    worker = getpid();
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaction(numbers[i], &action, NULL);
}

/* What keeper.py describes. Nothing runs in the sibling while it waits, so that it copies none of
 * the memory that it shares with this process. */
static PyObject *sibling(PyObject *module, PyObject *argument)
{
    (void)module;
    struct pollfd death = {.fd = (int)PyLong_AsLong(argument), .events = POLLIN};
    unsigned long flags = CLONE_FILES | CLONE_PARENT | SIGCHLD;
    if (PyErr_Occurred())
        return NULL;
    note_signals();
    PyOS_BeforeFork();
#if defined(__s390__) || defined(__CRIS__)
    long pid = syscall(SYS_clone, 0L, flags, 0L, 0L, 0L);
#else
    long pid = syscall(SYS_clone, flags, 0L, 0L, 0L, 0L);
#endif
    int error = errno;
    if (pid == 0) {
        while (poll(&death, 1, -1) < 1)
            ;
        PyOS_AfterFork_Child();
    } else {
        PyOS_AfterFork_Parent();
    }
    errno = error;
    return pid < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(pid);
}

/* What process_name.py describes: the name, and the memory that has the command line. */
static PyObject *show(PyObject *module, PyObject *arguments)
{
    const char *name, *line;
    unsigned long address;
    Py_ssize_t size;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "yky#", &name, &address, &line, &size))
        return NULL;
    prctl(PR_SET_NAME, name);
    memcpy((char *)address, line, (size_t)size);
    return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"share", share, METH_O, "share(memory, /)\n--\n\nUse the memory of a ledger."},
    {"show", show, METH_VARARGS, "show(name, address, line, /)\n--\n\nChange what ps(1) shows."},
    {"sibling", sibling, METH_O, "sibling(pidfd, /)\n--\n\nFork a process that shares descriptors."},
    {"fast_path", (PyCFunction)(void (*)(void))fast_path, METH_FASTCALL,
     "fast_path(fd, counts, held, /)\n--\n\nReceive and answer, as described in fast_path.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_fast_path", .m_methods = methods};

PyMODINIT_FUNC PyInit__fast_path(void)
{
    return PyModuleDef_Init(&definition);
}
