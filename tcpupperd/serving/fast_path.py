"""The fast path: receive once, and answer the complete lines immediately.

Nearly every line takes this path. There are two implementations with the same contract:
`python_fast_path`, the reference, needs nothing compiled; `_fast_path.c` does the same, four times
as fast for large chunks. `fast_path` is the one in C if it was built; `implementation` says which
one it is.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from tcpupperd.serving.protocol import count_lines

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable
    from typing import Protocol

    class Shared(Protocol):
        """What a ledger does for the fast path; see there."""

        memory: memoryview

        def receive(self, fd: int, size: int) -> bytes: ...
        def left_nothing(self, fd: int, lines: int) -> None: ...

    #: Two unsigned 64-bit numbers, which may be shared with other processes.
    Counts = array[int] | memoryview

    #: What is left after receiving once:
    #: - None: nothing; everything was answered, and no line is incomplete.
    #: - bytes: the answer to an incomplete line so far; everything else was answered.
    #: - b"": end of file; what was held is unchanged.
    #: - two bytes objects: the part of the answer that the kernel did not accept, and the answer
    #:   to an incomplete line so far.
    #: - a number: the errno with which the connection has failed. It is returned, not raised,
    #:   because many clients end their connections like this.
    Outcome = bytes | tuple[bytes, bytes] | int | None
    FastPath = Callable[[int, Counts, bytes], Outcome]

#: The maximum number of bytes received from one connection in a loop iteration, so that a client
#: that keeps sending cannot keep the others waiting. In pieces of 64 KiB, a stream would cost half
#: as much again. From 128 KiB on, malloc(3) would map memory for each buffer, which costs six
#: times as much as receiving a line.
RECEIVE_SIZE = 126976

#: The positions of the two counts.
ANSWERED, SENT = range(2)  # lines, bytes

#: The environment variable that forces the Python implementation.
SWITCH = "TCPUPPERD_PURE_PYTHON"


def python_fast_path(fd: int, counts: Counts, held: bytes) -> Outcome:
    """Receive from a non-blocking stream socket and answer up to the last newline.

    `held` is the answer to the incomplete line so far, of at most HELD_MAX bytes. The lines
    answered, or only received if sending has failed, and the bytes sent are added to `counts`, in
    this order. Raises BlockingIOError if there was nothing to receive, and OverflowError if a
    count would exceed 64 bits.
    """
    # os.read and os.write are used because the socket functions do not accept descriptors. They
    # cannot suppress SIGPIPE, as send(2) can, but Python ignores that signal from its start.
    try:
        data = receive(fd)
    except BlockingIOError:
        raise
    except OSError as error:
        return error.errno
    if not data:
        return b""
    answer = held + data.upper()
    end = data.rfind(b"\n") + 1
    if not end:
        return answer
    sent = lines = 0
    try:
        sent = os.write(fd, answer[: len(held) + end])
    except BlockingIOError:
        pass
    except OSError as error:
        return error.errno
    finally:
        lines = 1 if data.find(b"\n") == end - 1 else count_lines(data)
        counts[ANSWERED] += lines
    counts[SENT] += sent
    end += len(held)
    if sent < end:
        return answer[sent:end], answer[end:]
    if Receiving.ledger and not answer[end:]:
        Receiving.ledger.left_nothing(fd, lines)
    return answer[end:] or None


class Receiving:
    """Where this process receives."""

    ledger: Shared | None = None


def share(ledger: Shared | None) -> None:
    """Receive in this ledger from now on; with None, in memory of this process."""
    Receiving.ledger = ledger
    if fast_path is not python_fast_path:
        from tcpupperd.serving import _fast_path

        _fast_path.share(ledger and ledger.memory)


def receive(fd: int, size: int = RECEIVE_SIZE) -> bytes:
    """Receive once from a non-blocking stream socket, up to `size` bytes. Raises OSError."""
    return Receiving.ledger.receive(fd, size) if Receiving.ledger else os.read(fd, size)


def choose() -> tuple[FastPath, str]:
    """The implementation to use, and its name for --version and the log."""
    if os.environ.get(SWITCH):
        return python_fast_path, f"not using the C module ({SWITCH})"
    if "t" in sys.abiflags:
        # Its objects have a different layout, for which the binary is not built.
        return python_fast_path, "not using the C module (free-threaded Python)"
    try:
        from tcpupperd.serving._fast_path import fast_path  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        return python_fast_path, "not using the C module"
    except ImportError as error:  # built, but unusable here: better slow than not running
        return python_fast_path, f"not using the C module ({error})"
    return fast_path, "using the C module"


fast_path, implementation = choose()
