/* The turn of turn.py in C: the same result for the same bytes.
 *
 * `bytes.upper` goes byte by byte, and each line costs Python several more calls and objects.
 * Here, complete lines are received, upper-cased, counted and sent without any allocation, and
 * the GIL is released once for both system calls.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000 /* one binary for Python 3.11 and later */
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

/* The newlines of one block are counted in a single byte: a wider counter would make the compiler
 * widen each vector of bytes into several vectors of counters. */
enum { RECEIVE_SIZE = 65536, BLOCK = 240 };

struct turn {
    ssize_t received;
    ssize_t sent;
    uint64_t lines;
    int error; /* errno of the last system call */
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

static int whole_lines(const uint8_t *data, ssize_t size)
{
    return size > 0 && data[size - 1] == '\n';
}

/* The part that runs without the GIL. */
static void answer(int fd, uint8_t *data, struct turn *turn)
{
    turn->received = recv(fd, data, RECEIVE_SIZE, 0);
    if (whole_lines(data, turn->received)) {
        turn->lines = upper(data, (size_t)turn->received);
        turn->sent = send(fd, data, (size_t)turn->received, MSG_NOSIGNAL);
    }
    turn->error = errno;
}

static PyObject *failed(int error)
{
    if (PyErr_Occurred()) /* raised by a signal handler */
        return NULL;
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* The buffer of counts need not be aligned. */
static void add(char *count, ssize_t number)
{
    uint64_t sum;
    memcpy(&sum, count, sizeof sum);
    sum += (uint64_t)number;
    memcpy(count, &sum, sizeof sum);
}

/* The buffer is per thread, because another thread may take a turn while the GIL is released. On
 * the stack, where overflow protection touches each of its pages, it would cost 4 % of a line. */
static PyObject *take_turn(int fd, char *counts)
{
    static _Thread_local uint8_t data[RECEIVE_SIZE];
    struct turn turn = {0};
    do {
        Py_BEGIN_ALLOW_THREADS
        answer(fd, data, &turn);
        Py_END_ALLOW_THREADS
    } while (turn.received < 0 && turn.error == EINTR && PyErr_CheckSignals() == 0);
    if (turn.received < 0)
        return failed(turn.error);
    if (!whole_lines(data, turn.received))
        return Py_BuildValue("Oy#", Py_False, data, turn.received);
    add(counts, (ssize_t)turn.lines);
    /* If it was interrupted, send() has accepted nothing. A signal handler that ran here could take
     * a turn and overwrite the buffer, so sending again is left to the caller. */
    if (turn.sent < 0 && turn.error != EAGAIN && turn.error != EINTR)
        return failed(turn.error);
    if (turn.sent < 0)
        turn.sent = 0;
    add(counts + sizeof(uint64_t), turn.sent);
    if (turn.sent == turn.received)
        return Py_NewRef(Py_None);
    return Py_BuildValue("Oy#", Py_True, data + turn.sent, turn.received - turn.sent);
}

static PyObject *turn(PyObject *module, PyObject *const *arguments, Py_ssize_t number)
{
    (void)module;
    if (number != 2) {
        PyErr_SetString(PyExc_TypeError, "turn() requires a descriptor and a buffer of two counts");
        return NULL;
    }
    long fd = PyLong_AsLong(arguments[0]);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    Py_buffer counts;
    if (PyObject_GetBuffer(arguments[1], &counts, PyBUF_CONTIG) < 0)
        return NULL;
    PyObject *result = NULL;
    if (counts.itemsize == sizeof(uint64_t) && counts.len >= 2 * counts.itemsize)
        result = take_turn(fd == (int)fd ? (int)fd : -1, counts.buf);
    else
        PyErr_SetString(PyExc_ValueError, "the buffer must hold two counts of 8 bytes each");
    PyBuffer_Release(&counts);
    return result;
}

static PyMethodDef methods[] = {
    {"turn", (PyCFunction)(void (*)(void))turn, METH_FASTCALL,
     "turn(fd, counts, /)\n--\n\nTake a turn, as described in turn.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_turn", .m_methods = methods};

PyMODINIT_FUNC PyInit__turn(void)
{
    return PyModuleDef_Init(&definition);
}
