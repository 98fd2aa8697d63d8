"""The counters: one row for each, from which its position, its metric, its name in the log and,
for connections that ended, the reason in the log follow."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, MutableSequence
from functools import cache
from time import monotonic
from typing import NamedTuple

from tcpupperd.serving.ledger import NO_LEDGER, NoLedger


class Metric(NamedTuple):
    """A metric that only grows: its name without the prefix and `_total`, its meaning, and the
    label that distinguishes its counters, if there are several."""

    name: str
    help: str
    label: str = ""


class Row(NamedTuple):
    """A number: its name in the log, and the metric that contains it, if it is a counter."""

    name: str
    metric: Metric | None = None
    value: str = ""  # of the label
    help: str = ""


class Table:
    """The numbers of one kind of process, in the order of their positions."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def number(self, name: str) -> int:
        """Add a number that only this daemon reads; return its position."""
        self.rows.append(Row(name))
        return len(self.rows) - 1

    def counter(self, metric: Metric, value: str = "", text: str = "") -> int:
        """Add a counter; return its position."""
        self.rows.append(Row(_name(metric, value), metric, value, text or metric.help))
        return len(self.rows) - 1

    @property
    def names(self) -> list[str]:
        """The names of all numbers."""
        return [row.name for row in self.rows]


def _name(metric: Metric, value: str) -> str:
    """The name of a counter in the log: the words of its metric. For a reason why connections end,
    it is the reason alone."""
    if metric in ENDS:
        return value
    name = metric.name.removeprefix("connections_")
    return f"{name}_{value}" if value else name


CLOSED = Metric("connections_closed", "Connections ended, by reason.", "reason")
REFUSED = Metric(
    "connections_refused", "Connections closed before anything was answered, by reason.", "reason"
)
HANDED_OVER = Metric(
    "connections_handed_over",
    "Connections handed over from one process to another, by direction.",
    "direction",
)
DIED = Metric(
    "workers_died", "Workers that exited unexpectedly or had to be killed, by reason.", "reason"
)
REQUESTED = Metric(
    "requests", "Connections of administrators and load balancers, by service.", "service"
)
RELOADED = Metric("reloads", "Reloads, by result.", "result")

#: The metrics whose counters say why connections ended.
ENDS = (CLOSED, REFUSED)

#: The numbers of a worker, in its slot. Those up to OPEN describe the worker that occupies the
#: slot; the rest only grow, and the next worker in the slot continues from them. Times are in
#: microseconds, points in time CLOCK_MONOTONIC.
WORKER = Table()
STATE = WORKER.number("state")
HEARTBEAT = WORKER.number("heartbeat")  # when the last loop iteration began
PID = WORKER.number("pid")
GENERATION = WORKER.number("generation")  # the same for the workers of one generation
STARTED = WORKER.number("started")
KEEPER = WORKER.number("keeper")  # the process ID of its keeper
EXPECTED = WORKER.number("expected")  # connections of the message that is being taken over
EARLIER_LINES = WORKER.number("earlier_lines")  # answered by earlier workers in this slot
LONGEST_ITERATION = WORKER.number("longest_iteration")  # of the event loop
LONGEST_QUEUE = WORKER.number("longest_queue")  # time that a connection waited to be accepted
OPEN_PRIVILEGED = WORKER.number("open_privileged")  # those of `open` that are not clients'
MOST_OPEN = WORKER.number("most_open")  # connections open at the same time
MOST_TOGETHER = WORKER.number("most_together")  # those of all workers, when this one had more
OPEN = WORKER.number("open")  # connections open now
ACCEPTED = WORKER.counter(Metric("connections_accepted", "Connections of clients accepted."))
REQUESTS_AGENT = WORKER.counter(REQUESTED, "agent", "Connections to the agent.")
REQUESTS_METRICS = WORKER.counter(
    REQUESTED, "metrics", "Connections for metrics, the status page or a probe."
)
HANDED_OVER_OUT = WORKER.counter(HANDED_OVER, "out", "Connections handed over to another process.")
HANDED_OVER_IN = WORKER.counter(HANDED_OVER, "in", "Connections taken over from another process.")
LINES = WORKER.counter(Metric("lines", "Lines answered."))
RECEIVED_BYTES = WORKER.counter(Metric("received_bytes", "Bytes received from clients."))
SENT_BYTES = WORKER.counter(Metric("sent_bytes", "Bytes sent to clients."))
CLIENT_CLOSED = WORKER.counter(CLOSED, "client_closed", "Closed by the client.")
COMPLETE = WORKER.counter(
    CLOSED,
    "complete",
    "Closed after the last answer (lines_per_connection, HTTP, lab).",
)
SERVICE_STOPPED = WORKER.counter(
    CLOSED, "service_stopped", "Closed because the service was stopped, with everything answered."
)
PROBE = WORKER.counter(
    CLOSED, "probe", "Closed or reset by the client, which had sent nothing, as health checks do."
)
RESET = WORKER.counter(CLOSED, "reset", "Reset by the client, or failed in another way.")
IDLE_TIMEOUT = WORKER.counter(CLOSED, "idle_timeout", "Closed because idle_timeout expired.")
LINE_TIMEOUT = WORKER.counter(CLOSED, "line_timeout", "Closed because line_timeout expired.")
WRITE_TIMEOUT = WORKER.counter(CLOSED, "write_timeout", "Reset because write_timeout expired.")
DRAIN_TIMEOUT = WORKER.counter(
    CLOSED, "drain_timeout", "Reset because drain_timeout expired, with unsent answers."
)
STATE_UNREADABLE = WORKER.counter(
    CLOSED, "state_unreadable", "Closed because its state could not be read when taken over."
)
BUG = WORKER.counter(CLOSED, "bug", "Closed because of a bug, which the log describes.")
SOURCE_LIMIT = WORKER.counter(
    REFUSED, "source_limit", "Its source already had max_connections_per_source connections open."
)
PROXY_UNTRUSTED = WORKER.counter(REFUSED, "proxy_untrusted", "Its address is not in proxy_from.")
PROXY_ABSENT = WORKER.counter(
    REFUSED, "proxy_absent", "Its first bytes are not those of a PROXY header."
)
PROXY_INCOMPLETE = WORKER.counter(
    REFUSED, "proxy_incomplete", "Its PROXY header was truncated or not completed in time."
)
PROXY_INVALID = WORKER.counter(
    REFUSED, "proxy_invalid", "Its PROXY header does not follow the specification."
)
PROXY_CHECKSUM = WORKER.counter(
    REFUSED, "proxy_checksum", "Its PROXY header has the wrong checksum."
)
ACCEPT_PAUSES = WORKER.counter(
    Metric(
        "accept_pauses",
        "Number of times that accepting was paused for lack of capacity, descriptors or memory.",
    )
)
LOOP_ITERATIONS = WORKER.counter(
    Metric("loop_iterations", "Iterations of the workers' event loops.")
)
LOOP_MICROSECONDS = WORKER.number("loop_microseconds")  # spent in them, excluding waiting

#: After these, the connections accepted from each listener, at the position of its number. The
#: last of these positions is shared by all listeners with a higher number.
ACCEPTED_FROM, LISTENERS = len(WORKER.rows), 16
NUMBERS = ACCEPTED_FROM + LISTENERS

#: The numbers of the daemon, which the supervisor writes. Points in time are CLOCK_REALTIME in
#: microseconds.
DAEMON = Table()
SLOTS = DAEMON.number("slots")  # the number that have ever been in use
BEGAN = DAEMON.number("began")  # when the daemon started
WORKER_DIED = DAEMON.counter(CLOSED, "worker_died", "Lost with a worker.")
RESTARTS = DAEMON.counter(Metric("restarts", "Restarts that kept the open connections."))
WORKERS_STARTED = DAEMON.counter(Metric("workers_started", "Workers started."))
WORKERS_DIED_EXIT = DAEMON.counter(
    DIED, "exit", "Workers that exited without having been told to."
)
WORKERS_DIED_SIGNAL = DAEMON.counter(
    DIED, "signal", "Workers killed by a signal that the supervisor did not send."
)
WORKERS_DIED_HUNG = DAEMON.counter(DIED, "hung", "Workers killed because their heartbeat stopped.")
WORKERS_DIED_KILL_TIMEOUT = DAEMON.counter(
    DIED, "kill_timeout", "Workers killed because they did not exit in time."
)
RELOADS_SUCCESS = DAEMON.counter(RELOADED, "success", "Reloads that succeeded.")
RELOADS_FAILURE = DAEMON.counter(RELOADED, "failure", "Reloads that failed.")
LOADED = DAEMON.number("loaded")  # when the running configuration was loaded
LAST_RELOAD = DAEMON.number("last_reload")  # when the last reload ended, or 0
LAST_RELOAD_FAILED = DAEMON.number("last_reload_failed")  # whether that reload failed
FILE_NUMBER = DAEMON.number("file_number")  # the inode of the file that was loaded, or 0
FILE_TIME = DAEMON.number("file_time")  # its modification time, in nanoseconds
STOPPING_SOON = DAEMON.number("stopping_soon")  # told to stop: new clients should go elsewhere
LONGEST_LINE = DAEMON.number("longest_line")  # largest max_line that any connection may have had
PEAK = DAEMON.number("peak")  # largest MOST_TOGETHER of the workers that have exited

STARTING, ACCEPTING, EXITING = range(3)  # values of STATE


@cache
def reason(counter: int) -> str:
    """The reason why the connections in a counter of workers ended, in words for the log."""
    return WORKER.rows[counter].name.replace("_", " ")


def new_row() -> list[int]:
    """The numbers of a server without other workers."""
    numbers = [0] * NUMBERS
    numbers[STATE], numbers[PID], numbers[STARTED] = ACCEPTING, os.getpid(), microseconds()
    return numbers


def microseconds() -> int:
    """CLOCK_MONOTONIC in the unit of the numbers."""
    return int(monotonic() * 1_000_000)


class Tally:
    """The counts of one server: `numbers` are those of WORKER, which other processes may read.

    The counters that change with every line are plain numbers and are published once per loop
    iteration, because adding to a number in shared memory takes longer.
    """

    __slots__ = (
        "_iterations",
        "_longest",
        "_unwritten",
        "counts",
        "debug",
        "ledger",
        "numbers",
        "open_together",
        "privileged",
        "received",
        "sent",
    )

    def __init__(
        self, numbers: MutableSequence[int] | memoryview | None = None, *, debug: bool = False
    ) -> None:
        self.numbers = new_row() if numbers is None else numbers
        self.debug = debug  # whether connections and data are also logged
        self.ledger: NoLedger = NO_LEDGER
        # Lines answered, and bytes sent by `fast_path`, which has received the same number.
        self.counts = array("Q", [self.numbers[LINES], 0])
        self.sent = self.numbers[SENT_BYTES]  # other than by `fast_path`
        self.received = self.numbers[RECEIVED_BYTES]
        self.privileged = 0  # connections that are not clients'
        # The open connections of all workers.
        self.open_together: Callable[[], int] = lambda: self.numbers[OPEN]
        self._iterations = self.numbers[LOOP_ITERATIONS]
        self._longest = 0.0
        self._unwritten = 0.0  # time that is not yet in the numbers

    def add(self, field: int, count: int = 1) -> None:
        """Count a rare event."""
        self.numbers[field] += count

    def publish(self, connections: int, took: float) -> None:
        """Write the current values to the numbers, at the end of a loop iteration that took
        `took` seconds."""
        numbers = self.numbers
        answered, sent = self.counts
        more = connections > numbers[OPEN]
        numbers[OPEN] = connections
        numbers[OPEN_PRIVILEGED] = self.privileged
        if more:
            self.record_peaks()
        numbers[LINES] = answered
        numbers[SENT_BYTES] = sent + self.sent
        numbers[RECEIVED_BYTES] = sent + self.received
        self._iterations = numbers[LOOP_ITERATIONS] = self._iterations + 1
        self._unwritten += took
        if self._unwritten >= 0.001:
            numbers[LOOP_MICROSECONDS] += int(self._unwritten * 1_000_000)
            self._unwritten = 0.0
        if took > self._longest:
            self._longest = took
            numbers[LONGEST_ITERATION] = int(took * 1_000_000)

    def record_peaks(self) -> None:
        """Record how many connections are open if there have never been as many."""
        numbers = self.numbers
        numbers[MOST_OPEN] = max(numbers[OPEN], numbers[MOST_OPEN])
        numbers[MOST_TOGETHER] = max(self.open_together(), numbers[MOST_TOGETHER])
