"""What is counted, and where each count stands in a row of numbers."""

from __future__ import annotations

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
