"""Standard output, which may be a slow pipe, non-blocking or closed."""

import os
from select import POLLOUT, poll

from tcpupperd.errors import ExpectedError

STDOUT = 1


def write_output(data: bytes) -> None:
    """Write everything to standard output, waiting for its reader.

    Raises ExpectedError on failure.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(STDOUT, rest) :]
        except BlockingIOError:  # the parent process made it non-blocking
            writable = poll()
            writable.register(STDOUT, POLLOUT)
            writable.poll()
        except OSError as error:
            raise ExpectedError(f"cannot write standard output: {error.strerror}") from error
