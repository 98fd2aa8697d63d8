"""The counters, and the position of each in an array of numbers."""

from __future__ import annotations

import os
from array import array
from collections.abc import MutableSequence
from time import monotonic

#: The numbers of a worker, in the order of its slot. Those up to "open" describe the worker that
#: occupies the slot; the rest only grow, and the next worker in the slot continues from them.
FIELDS = (
    "state",
    "heartbeat",  # CLOCK_MONOTONIC in microseconds when the last loop iteration began
    "pid",
    "started",  # CLOCK_MONOTONIC in microseconds
    "earlier_lines",  # answered by earlier workers in this slot
    "longest_turn",  # loop iteration, in microseconds
    "longest_queue",  # time that a connection waited to be accepted, in microseconds
    "open",  # connections open now
    "accepted",
    "taken",  # over from another process
    "given",  # handed over to another process
    "lines",
    "bytes",  # sent
    "received",  # bytes
    "refused",  # beyond max_connections_per_source
    "proxy_untrusted",  # refused: no PROXY header is accepted from this address
    "proxy_absent",  # refused: something other than a header arrived
    "proxy_incomplete",  # refused: the header was truncated or not completed in time
    "proxy_invalid",  # refused: the header does not follow the specification
    "proxy_checksum",  # refused: the header has the wrong checksum
    "eof",  # closed by the client, which has read its answers
    "finished",  # closed by the server after the last answer (lines_per_connection, HTTP)
    "stopped",  # closed because the service is stopping
    "reset",  # reset by the client, or failed in another way
    "idle_timeout",
    "line_timeout",
    "write_timeout",
    "cut",  # reset when drain_timeout expired, with unsent answers
    "damaged",  # closed because their state could not be read when taken over
    "errors",  # bugs in the daemon
    "shortages",  # pauses in accepting, for lack of capacity, descriptors or memory
    "probes",  # closed by the client before it sent anything, as health checks do
    "turns",  # loop iterations
    "busy",  # microseconds spent in them, excluding waiting
)
(
    STATE,
    HEARTBEAT,
    PID,
    STARTED,
    EARLIER_LINES,
    LONGEST_TURN,
    LONGEST_QUEUE,
    OPEN,
    ACCEPTED,
    TAKEN,
    GIVEN,
    LINES,
    BYTES,
    RECEIVED,
    REFUSED,
    PROXY_UNTRUSTED,
    PROXY_ABSENT,
    PROXY_INCOMPLETE,
    PROXY_INVALID,
    PROXY_CHECKSUM,
    EOF,
    FINISHED,
    STOPPED,
    RESET,
    IDLE_TIMEOUT,
    LINE_TIMEOUT,
    WRITE_TIMEOUT,
    CUT,
    DAMAGED,
    ERRORS,
    SHORTAGES,
    PROBES,
    TURNS,
    BUSY,
) = range(len(FIELDS))

STARTING, ACCEPTING, LEAVING = range(3)  # values of `state`


def alone() -> list[int]:
    """The numbers of a server without other workers."""
    numbers = [0] * len(FIELDS)
    numbers[STATE], numbers[PID], numbers[STARTED] = ACCEPTING, os.getpid(), microseconds()
    return numbers


def microseconds() -> int:
    """CLOCK_MONOTONIC in the unit of the numbers."""
    return int(monotonic() * 1_000_000)


class Tally:
    """The counts of one server: `numbers` is an array of FIELDS, which other processes may read.

    The counters that change with every line are plain numbers and are published once per loop
    iteration, because adding to a number in shared memory takes longer.
    """

    __slots__ = (
        "_longest",
        "_turns",
        "_unwritten",
        "counts",
        "debug",
        "numbers",
        "received",
        "sent",
    )

    def __init__(
        self, numbers: MutableSequence[int] | memoryview | None = None, *, debug: bool = False
    ) -> None:
        self.numbers = alone() if numbers is None else numbers
        self.debug = debug  # whether connections and data are also logged
        # Lines answered, and bytes sent by `turn`, which has received the same number.
        self.counts = array("Q", [self.numbers[LINES], 0])
        self.sent = self.numbers[BYTES]  # other than by `turn`
        self.received = self.numbers[RECEIVED]
        self._turns = self.numbers[TURNS]
        self._longest = 0.0
        self._unwritten = 0.0  # time that is not yet in the numbers

    def add(self, field: int, count: int = 1) -> None:
        """Count a rare event."""
        self.numbers[field] += count

    def publish(self, connections: int, turn_time: float) -> None:
        """Write the current values to the numbers, at the end of a loop iteration that took
        `turn_time` seconds."""
        numbers = self.numbers
        answered, sent = self.counts
        numbers[OPEN] = connections
        numbers[LINES] = answered
        numbers[BYTES] = sent + self.sent
        numbers[RECEIVED] = sent + self.received
        self._turns = numbers[TURNS] = self._turns + 1
        self._unwritten += turn_time
        if self._unwritten >= 0.001:
            numbers[BUSY] += int(self._unwritten * 1_000_000)
            self._unwritten = 0.0
        if turn_time > self._longest:
            self._longest = turn_time
            numbers[LONGEST_TURN] = int(turn_time * 1_000_000)
