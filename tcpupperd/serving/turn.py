"""A turn: receive once, and immediately answer what requires no state.

Nearly every line takes this path. There are two implementations with the same contract:
`python_turn`, the reference, needs nothing compiled; `_turn.c` does the same, four times as fast
for large chunks. `turn` is the one in C if it was built; `implementation` says which one it is.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from tcpupperd.serving.protocol import count_lines

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    #: Two unsigned 64-bit numbers, which may be shared with other processes.
    Counts = array[int] | memoryview
    Outcome = tuple[bool, bytes] | None

#: The maximum number of bytes received from one connection in a loop iteration, so that a client
#: that keeps sending cannot keep the others waiting.
RECEIVE_SIZE = 65536

#: The positions of the two counts.
ANSWERED, SENT = range(2)  # lines, bytes

#: The environment variable that forces the Python implementation.
SWITCH = "TCPUPPERD_PURE_PYTHON"


def python_turn(fd: int, counts: Counts) -> Outcome:
    """Receive from a non-blocking stream socket and, if the data is complete lines, answer them.

    The lines answered and the bytes sent are added to `counts`, in this order. None means that
    nothing is left to do. Otherwise the caller has to deal with the rest: (True, the part of the
    answer that the kernel did not accept), or (False, the data received), which is b"" at end of
    file or is not complete lines, and which has been neither answered nor counted.

    Raises BlockingIOError if there was nothing to receive, and any other OSError if the connection
    has failed.
    """
    # os.read and os.write are used because the socket functions do not accept descriptors. They
    # cannot suppress SIGPIPE, as send(2) can, but Python ignores that signal from its start.
    data = os.read(fd, RECEIVE_SIZE)
    if data[-1:] != b"\n":
        return False, data
    counts[ANSWERED] += 1 if data.find(b"\n") == len(data) - 1 else count_lines(data)
    answer = data.upper()
    try:
        sent = os.write(fd, answer)
    except BlockingIOError:
        sent = 0
    counts[SENT] += sent
    return None if sent == len(answer) else (True, answer[sent:])


def choose() -> tuple[Callable[[int, Counts], Outcome], str]:
    """The implementation to use, and its name for --version and the log."""
    if os.environ.get(SWITCH):
        return python_turn, f"not using the C module ({SWITCH})"
    if "t" in sys.abiflags:
        # Its objects have a different layout, for which the binary is not built.
        return python_turn, "not using the C module (free-threaded Python)"
    try:
        from tcpupperd.serving._turn import turn  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        return python_turn, "not using the C module"
    except ImportError as error:  # built, but unusable here: better slow than not running
        return python_turn, f"not using the C module ({error})"
    return turn, "using the C module"


turn, implementation = choose()
