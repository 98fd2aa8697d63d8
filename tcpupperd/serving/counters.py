"""What is counted, and where each count stands in a row of numbers."""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence

#: What is counted, in the order of a slot. The first three say how the worker is; all that
#: follow only ever grow, and live on in the totals when their worker is gone.
FIELDS = (
    "state",
    "heartbeat",  # CLOCK_MONOTONIC in microseconds when the last turn began
    "open",  # connections at present
    "accepted",
    "taken",  # over from another process
    "given",  # to another process
    "lines",
    "bytes",
    "refused",  # over max_connections_per_source
    "reset",  # by the client, or failed otherwise
    "idle_timeout",
    "line_timeout",
    "write_timeout",
    "cut",  # ended with answers still to send: drain_timeout
    "damaged",  # ended because their state could not be read when taken over
    "errors",  # bugs of ours
    "shortages",  # times that accepting stopped for want of room, descriptors or memory
)
(
    STATE,
    HEARTBEAT,
    OPEN,
    ACCEPTED,
    TAKEN,
    GIVEN,
    LINES,
    BYTES,
    REFUSED,
    RESET,
    IDLE_TIMEOUT,
    LINE_TIMEOUT,
    WRITE_TIMEOUT,
    CUT,
    DAMAGED,
    ERRORS,
    SHORTAGES,
) = range(len(FIELDS))

STARTING, ACCEPTING, LEAVING = range(3)  # values of `state`


class Tally:
    """The counts of one server: `numbers` is a row of FIELDS, which other processes may read.

    `counts` is what every line adds to: lines answered, bytes sent (see `turn`). It is published
    once a turn of the server: to add to a number in shared memory takes longer.
    """

    __slots__ = ("counts", "debug", "numbers")

    def __init__(
        self, numbers: MutableSequence[int] | memoryview | None = None, *, debug: bool = False
    ) -> None:
        self.numbers = [0] * len(FIELDS) if numbers is None else numbers
        self.debug = debug  # whether connections and data are logged, too
        self.counts = array("Q", [0, 0])

    def add(self, field: int, count: int = 1) -> None:
        """Count something that is rare."""
        self.numbers[field] += count

    def publish(self, connections: int) -> None:
        """Make the numbers what they are now."""
        self.numbers[OPEN] = connections
        self.numbers[LINES], self.numbers[BYTES] = self.counts
