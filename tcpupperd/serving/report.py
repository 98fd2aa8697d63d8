"""The report: a snapshot of the state of the whole daemon, for its readers over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from time import time
from typing import NamedTuple

from tcpupperd import __version__
from tcpupperd.address import SERVICES, UPPER
from tcpupperd.host.sockets import Listener
from tcpupperd.host.tcp_info import queue_of
from tcpupperd.serving.counters import (
    EARLIER_LINES,
    EXITING,
    HEARTBEAT,
    LINES,
    LONGEST_ITERATION,
    LONGEST_QUEUE,
    MOST_OPEN,
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
    """A listener, with the connections waiting to be accepted."""

    service: str
    address: str
    queue: int | None  # None if the kernel does not say
    queue_limit: int | None


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
    configuration: str = ""  # the path of the file
    loaded: float = 0.0  # when the running configuration was loaded
    current: bool | None = None  # whether the file on disk is running; None if there is no file
    last_reload: float = 0.0
    last_reload_failed: bool = False
    leaving: bool = False  # about to stop: new clients should go elsewhere

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
    return Report(
        version=__version__,
        host=socket.gethostname(),
        now=now,
        began=now - worker.age,
        listeners=reports_of(listeners),
        workers=[worker],
        counters=dict(zip(WORKER.names[OPEN:], numbers[OPEN:], strict=True)),
        limit=limit,
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


def reports_of(listeners: Iterable[Listener]) -> list[ListenerReport]:
    """The reports on listeners, in an order that does not depend on that in which the service
    manager passed them."""
    return sorted(map(report_of, listeners), key=lambda one: (SERVICES.index(one.service), one))


def report_of(listener: Listener) -> ListenerReport:
    """The report on a listener at this moment."""
    service = listener.name if listener.name in SERVICES else UPPER
    address = written(listener.socket.getsockname())
    queue, limit = queue_of(listener.socket) or (None, None)
    return ListenerReport(service, address, queue, limit)
