"""The report: a snapshot of the state of the whole daemon, for its readers over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import time
from typing import NamedTuple

from tcpupperd import __version__
from tcpupperd.address import SERVICES, UPPER
from tcpupperd.host.sockets import Listener
from tcpupperd.host.tcp_info import queue_of
from tcpupperd.serving.counters import (
    ACCEPTED_FROM,
    EARLIER_LINES,
    EXITING,
    HEARTBEAT,
    LINES,
    LISTENERS,
    LONGEST_ITERATION,
    LONGEST_QUEUE,
    MOST_OPEN,
    MOST_TOGETHER,
    OPEN,
    OPEN_PRIVILEGED,
    PID,
    STARTED,
    STATE,
    WORKER,
    microseconds,
)
from tcpupperd.words import written

#: Names for the values of `counters.STATE`, in their order; the last is that of a worker that
#: still serves, but is about to stop.
STATES = ("starting", "serving", "exiting", "leaving")


class WorkerReport(NamedTuple):
    """A worker; times in seconds."""

    pid: int
    state: str
    connections: int
    most_connections: int  # at the same time
    lines: int
    age: float
    since_heartbeat: float | None  # seconds; None without a watchdog
    longest_iteration: float
    longest_queue: float  # time that a connection waited to be accepted
    privileged: int = 0  # connections that are not clients'


class ListenerReport(NamedTuple):
    """A listener, with its connections since the daemon started, and those waiting to be
    accepted."""

    service: str
    address: str
    queue: int | None  # None if the kernel does not say
    queue_limit: int | None
    number: int = 0  # tells it apart from the others
    accepted: int | None = None  # None if there are too many listeners


class Report(NamedTuple):
    """The daemon. Points in time are in seconds since the Unix epoch; 0 means never."""

    version: str
    host: str
    now: float
    began: float
    listeners: list[ListenerReport]
    workers: list[WorkerReport]
    counters: Mapping[str, int]  # by the names in the log
    limit: int = 0  # maximum number of open connections for all workers together
    peak: int = 0  # the largest number that were open at the same time
    configuration: str = ""  # the path of the file
    loaded: float = 0.0  # when the running configuration was loaded
    current: bool | None = None  # whether the file on disk is running; None if there is no file
    last_reload: float = 0.0
    last_reload_failed: bool = False
    leaving: bool = False  # about to stop: new clients should go elsewhere

    @property
    def clients(self) -> int:
        """The number of open connections of clients, to which the limit applies."""
        return sum(worker.connections - worker.privileged for worker in self.workers)

    @property
    def waiting(self) -> int:
        """The number of clients in the accept queues, as far as the kernel says."""
        return sum(one.queue or 0 for one in self.listeners)


def report_of_single_server(
    numbers: Sequence[int] | memoryview,
    listeners: Iterable[Listener],
    *,
    limit: int,
    leaving: bool,
) -> Report:
    """The report of a server without other workers, from its numbers."""
    worker = report_of_worker(list(numbers), microseconds(), leaving=leaving)
    now = time()

    def accepted_from(number: int) -> int | None:
        return numbers[ACCEPTED_FROM + number] if number < LISTENERS - 1 else None

    return Report(
        version=__version__,
        host=socket.gethostname(),
        now=now,
        began=now - worker.age,
        listeners=reports_of(listeners, accepted_from),
        workers=[worker],
        counters=dict(zip(WORKER.names[OPEN:], numbers[OPEN:ACCEPTED_FROM], strict=True)),
        limit=limit,
        peak=numbers[MOST_TOGETHER],
        leaving=leaving,
    )


def report_of_worker(numbers: Sequence[int], now: int, *, leaving: bool) -> WorkerReport:
    """The report on a worker, from its numbers; `now` is in their unit."""
    began, beat = numbers[STARTED], numbers[HEARTBEAT]
    return WorkerReport(
        pid=numbers[PID],
        state=_state(numbers[STATE], leaving=leaving),
        connections=numbers[OPEN],
        most_connections=numbers[MOST_OPEN],
        lines=numbers[LINES] - numbers[EARLIER_LINES],
        age=max(0, now - began) / 1_000_000,
        # The first heartbeat, set at the start, proves nothing.
        since_heartbeat=max(0, now - beat) / 1_000_000 if beat > began else None,
        longest_iteration=numbers[LONGEST_ITERATION] / 1_000_000,
        longest_queue=numbers[LONGEST_QUEUE] / 1_000_000,
        privileged=numbers[OPEN_PRIVILEGED],
    )


def _state(number: int, *, leaving: bool) -> str:
    """The name of a worker's state. Only the worker itself vouches for the number."""
    state = STATES[min(number, EXITING)]
    return "leaving" if leaving and state == "serving" else state


def reports_of(
    listeners: Iterable[Listener], accepted_from: Callable[[int], int | None]
) -> list[ListenerReport]:
    """The reports on listeners, in an order that does not depend on that in which the service
    manager passed them. `accepted_from` is called with their numbers."""
    found = [report_of(one, accepted_from(one.number)) for one in listeners]
    return sorted(found, key=lambda one: (SERVICES.index(one.service), one.address))


def report_of(listener: Listener, accepted: int | None) -> ListenerReport:
    """The report on a listener at this moment."""
    service = listener.name if listener.name in SERVICES else UPPER
    address = written(listener.socket.getsockname())
    queue, limit = queue_of(listener.socket) or (None, None)
    return ListenerReport(service, address, queue, limit, listener.number, accepted)
