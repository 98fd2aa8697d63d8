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
    "longest_turn",  # loop iteration, in microseconds
    "longest_queue",  # time that a connection waited to be accepted, in microseconds
    "open",  # connections open now
    "accepted",
    "taken",  # over from another process
    "given",  # away to another process
    "lines",
    "bytes",  # sent
    "received",  # bytes
    "refused",  # over max_connections_per_source
    "proxy_untrusted",  # refused: no header of the PROXY protocol is accepted from this address
    "proxy_absent",  # refused: something else came instead of the header
    "proxy_incomplete",  # refused: the header ended too early, or did not end in time
    "proxy_invalid",  # refused: the header does not follow the specification
    "proxy_checksum",  # refused: the checksum of the header is wrong
    "eof",  # ended by the client, which has read its answers
    "finished",  # ended by us after the last answer (lines_per_connection, a single request)
    "stopped",  # ended because the service stops
    "reset",  # by the client, or failed in another way
    "idle_timeout",
    "line_timeout",
    "write_timeout",
    "cut",  # ended by drain_timeout with unsent answers
    "damaged",  # ended because their state could not be read when taken over
    "errors",  # our bugs
    "shortages",  # times that accepting stopped for lack of room, descriptors or memory
    "probes",  # ended by the client before anything was received, as by health checks
    "turns",  # loop iterations
    "busy",  # microseconds in them, without the time of waiting
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
    """The numbers of a server that is the only one."""
    numbers = [0] * len(FIELDS)
    numbers[STATE], numbers[PID], numbers[STARTED] = ACCEPTING, os.getpid(), microseconds()
    return numbers


def microseconds() -> int:
    """CLOCK_MONOTONIC, as the numbers have it."""
    return int(monotonic() * 1_000_000)


class Tally:
    """The counts of one server: `numbers` is a row of FIELDS, which other processes may read.

    The counters that every line changes are plain numbers, and are published once per loop
    iteration: adding to a number in shared memory takes longer.
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
        # Lines answered, and bytes sent by `turn`, which are as many as it has received.
        self.counts = array("Q", [self.numbers[LINES], 0])
        self.sent = self.numbers[BYTES]  # otherwise
        self.received = self.numbers[RECEIVED]
        self._turns = self.numbers[TURNS]
        self._longest = 0.0
        self._unwritten = 0.0  # time that is not yet in the numbers

    def add(self, field: int, count: int = 1) -> None:
        """Count a rare event."""
        self.numbers[field] += count

    def publish(self, connections: int, turn_time: float) -> None:
        """Write the current values to the numbers, at the end of a loop iteration that took so
        many seconds."""
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
