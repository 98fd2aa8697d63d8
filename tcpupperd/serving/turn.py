"""A turn: receive once, and answer at once what needs nothing remembered.

This is the way of nearly every line. It is there twice, with one contract: `python_turn`, the
reference, needs nothing compiled; the one in `_turn.c` does the same four times as fast where much
comes at once. `turn` is the C one if it was built, and `implementation` says which one it is.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from tcpupperd.serving.protocol import count_lines

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    #: Two unsigned numbers of 64 bits, which may be shared with other processes.
    Counts = array[int] | memoryview
    Outcome = tuple[bool, bytes] | None

#: The maximum number of bytes received from one connection in a loop iteration, so that a client
#: that sends without pause cannot keep the others waiting.
RECEIVE_SIZE = 65536

#: Where the two counts stand.
ANSWERED, SENT = range(2)  # lines, bytes

#: The environment variable that has the Python one used, whatever was built.
SWITCH = "TCPUPPERD_PURE_PYTHON"


def python_turn(fd: int, counts: Counts) -> Outcome:
    """Receive from a non-blocking stream socket and, if these are whole lines, answer them.

    `counts` are lines answered and bytes sent, in this order, and are added to. None says that
    all is done. Otherwise something is left to the caller: (True, the part of the answer that the
    kernel did not take), or (False, what was received), which is not whole lines, or b"" at end of
    file, and which has been neither answered nor counted.

    Raises BlockingIOError if there was nothing to receive, and any other OSError if the connection
    has failed.
    """
    # What reads and writes files is used, because nothing else takes a descriptor. SIGPIPE, which
    # only sockets can be told not to cause, is ignored by Python from its start.
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
    """The turn to take, and how it is called where the version is told."""
    if os.environ.get(SWITCH):
        return python_turn, f"not using the C module ({SWITCH})"
    if "t" in sys.abiflags:
        # Its objects are laid out in another way, and the binary has the layout of all others.
        return python_turn, "not using the C module (free-threaded Python)"
    try:
        from tcpupperd.serving._turn import turn  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        return python_turn, "not using the C module"
    except ImportError as error:  # built, but of no use here: better slow than down
        return python_turn, f"not using the C module ({error})"
    return turn, "using the C module"


turn, implementation = choose()
