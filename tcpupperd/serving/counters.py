"""The counters, and the position of each in a row of numbers."""

from __future__ import annotations

import os
from array import array
from collections.abc import MutableSequence
from time import monotonic

#: The numbers of a worker, in the order of its slot. Those up to "open" describe the worker that
#: has the slot; the rest only grow, and the next worker that gets the slot goes on from there.
FIELDS = (
    "state",
    "heartbeat",  # CLOCK_MONOTONIC in microseconds when the last loop iteration began
    "pid",
    "started",  # CLOCK_MONOTONIC in microseconds
    "earlier_lines",  # answered by earlier workers in this slot
    "open",  # connections open now
    "accepted",
    "taken",  # over from another process
    "given",  # away to another process
    "lines",
    "bytes",
    "refused",  # over max_connections_per_source
    "proxy_untrusted",  # refused: no header of the PROXY protocol is accepted from this address
    "proxy_absent",  # refused: something else came instead of the header
    "proxy_incomplete",  # refused: the header ended too early, or did not end in time
    "proxy_invalid",  # refused: the header does not follow the specification
    "proxy_checksum",  # refused: the checksum of the header is wrong
    "reset",  # by the client, or failed in another way
    "idle_timeout",
    "line_timeout",
    "write_timeout",
    "cut",  # ended by drain_timeout with unsent answers
    "damaged",  # ended because their state could not be read when taken over
    "errors",  # our bugs
    "shortages",  # times that accepting stopped for lack of room, descriptors or memory
    "probes",  # ended by the client before anything was received, as by health checks
)
(
    STATE,
    HEARTBEAT,
    PID,
    STARTED,
    EARLIER_LINES,
    OPEN,
    ACCEPTED,
    TAKEN,
    GIVEN,
    LINES,
    BYTES,
    REFUSED,
    PROXY_UNTRUSTED,
    PROXY_ABSENT,
    PROXY_INCOMPLETE,
    PROXY_INVALID,
    PROXY_CHECKSUM,
    RESET,
    IDLE_TIMEOUT,
    LINE_TIMEOUT,
    WRITE_TIMEOUT,
    CUT,
    DAMAGED,
    ERRORS,
    SHORTAGES,
    PROBES,
) = range(len(FIELDS))

STARTING, ACCEPTING, LEAVING = range(3)  # values of `state`


def alone() -> list[int]:
    """The numbers of a server that is the only one."""
    numbers = [0] * len(FIELDS)
    numbers[STATE], numbers[PID], numbers[STARTED] = ACCEPTING, os.getpid(), microseconds()
    return numbers


def microseconds() -> int:
    """CLOCK_MONOTONIC, as the numbers have it."""
    return int(monotonic() * 1_000_000)


class Tally:
    """The counts of one server: `numbers` is a row of FIELDS, which other processes may read.

    `counts` has the counters that every line changes: lines answered and bytes sent (see `turn`).
    They are published once per loop iteration: adding to a number in shared memory takes longer.
    """

    __slots__ = ("counts", "debug", "numbers")

    def __init__(
        self, numbers: MutableSequence[int] | memoryview | None = None, *, debug: bool = False
    ) -> None:
        self.numbers = alone() if numbers is None else numbers
        self.debug = debug  # whether connections and data are also logged
        self.counts = array("Q", [self.numbers[LINES], self.numbers[BYTES]])

    def add(self, field: int, count: int = 1) -> None:
        """Count a rare event."""
        self.numbers[field] += count

    def publish(self, connections: int) -> None:
        """Write the current values to the numbers."""
        self.numbers[OPEN] = connections
        self.numbers[LINES], self.numbers[BYTES] = self.counts
