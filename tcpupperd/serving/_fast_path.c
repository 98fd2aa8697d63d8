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
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

/* The newlines of one block are counted in a single byte: a wider counter would make the compiler
 * widen each vector of bytes into several vectors of counters. */
enum { RECEIVE_SIZE = 126976, HELD_MAX = 4096, BLOCK = 240 };

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
    pass->received = recv(fd, new, RECEIVE_SIZE, 0);
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
    static _Thread_local uint8_t data[HELD_MAX + RECEIVE_SIZE];
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

static PyMethodDef methods[] = {
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
