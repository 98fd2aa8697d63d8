"""A report: the state of the whole daemon at one moment, for those who read it over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from time import time
from typing import NamedTuple

from tcpupperd import __version__
from tcpupperd.address import SERVICES, written
from tcpupperd.host.sockets import Listener
from tcpupperd.host.tcp_info import queue_of
from tcpupperd.serving.counters import (
    EARLIER_LINES,
    FIELDS,
    HEARTBEAT,
    LINES,
    LONGEST_QUEUE,
    LONGEST_TURN,
    OPEN,
    PID,
    STARTED,
    STATE,
    microseconds,
)

#: In the order of the values of `counters.STATE`.
STATES = ("starting", "serving", "leaving")


class WorkerReport(NamedTuple):
    """A worker; times in seconds."""

    pid: int
    state: str
    connections: int
    lines: int
    age: float
    silent_for: float | None  # since its last sign of life; None if nobody asks for them
    longest_turn: float
    longest_queue: float  # time that a connection waited to be accepted


class ListenerReport(NamedTuple):
    """A listener, with the connections that wait to be accepted."""

    service: str
    address: str
    queue: int | None  # None if the kernel does not say
    queue_limit: int | None


class Report(NamedTuple):
    """The daemon. Points in time are seconds since 1970; 0 is never."""

    version: str
    host: str
    now: float
    began: float
    listeners: list[ListenerReport]
    workers: list[WorkerReport]
    counters: Mapping[str, int]  # by the names of `counters.FIELDS` and `scoreboard.DAEMON`
    limit: int = 0  # connections that all workers may have together
    configuration: str = ""  # the path of the file
    loaded: float = 0.0  # when the configuration came into force
    in_force: bool | None = None  # whether the file on disk is; None if there is no file
    last_reload: float = 0.0
    last_reload_failed: bool = False


def report_of_one(
    numbers: Sequence[int] | memoryview, listeners: Iterable[Listener], limit: int
) -> Report:
    """The report of a server that is the only one, by its numbers."""
    worker = report_of_worker(list(numbers), microseconds())
    now = time()
    return Report(
        version=__version__,
        host=socket.gethostname(),
        now=now,
        began=now - worker.age,
        listeners=[report_of(one) for one in listeners],
        workers=[worker],
        counters={FIELDS[field]: numbers[field] for field in range(OPEN, len(FIELDS))},
        limit=limit,
    )


def report_of_worker(numbers: Sequence[int], now: int) -> WorkerReport:
    """A worker by its numbers; `now` as they have it."""
    began, beat = numbers[STARTED], numbers[HEARTBEAT]
    return WorkerReport(
        pid=numbers[PID],
        # Nobody but the worker vouches for it.
        state=STATES[min(numbers[STATE], len(STATES) - 1)],
        connections=numbers[OPEN],
        lines=numbers[LINES] - numbers[EARLIER_LINES],
        age=max(0, now - began) / 1_000_000,
        # The first one, set at the start, says nothing.
        silent_for=max(0, now - beat) / 1_000_000 if beat > began else None,
        longest_turn=numbers[LONGEST_TURN] / 1_000_000,
        longest_queue=numbers[LONGEST_QUEUE] / 1_000_000,
    )


def report_of(listener: Listener) -> ListenerReport:
    """A listener, as it is now."""
    service = listener.name if listener.name in SERVICES else SERVICES[0]
    address = written(listener.socket.getsockname())
    queue, limit = queue_of(listener.socket) or (None, None)
    return ListenerReport(service, address, queue, limit)
