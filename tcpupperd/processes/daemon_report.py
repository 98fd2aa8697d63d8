"""Builds the report on the whole daemon; any process can do so."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from time import time

from tcpupperd import __version__
from tcpupperd.host.sockets import Listener
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.processes.source import file_identity
from tcpupperd.serving.counters import (
    BEGAN,
    FILE_NUMBER,
    FILE_TIME,
    LAST_RELOAD,
    LAST_RELOAD_FAILED,
    LOADED,
    microseconds,
)
from tcpupperd.serving.report import Report, report_of_worker, reports_of


def collect_report(
    scoreboard: Scoreboard,
    listeners: Iterable[Listener],
    *,
    limit: int,
    path: str | None,
    leaving: bool,
) -> Report:
    """The report on the daemon; `limit` is the number of connections that all workers together may
    have, `path` the configuration file, `leaving` whether it is about to stop."""
    daemon, now = scoreboard.daemon, microseconds()
    loaded = (daemon[FILE_NUMBER], daemon[FILE_TIME])
    return Report(
        version=__version__,
        host=socket.gethostname(),
        now=time(),
        began=daemon[BEGAN] / 1_000_000,
        listeners=reports_of(listeners, scoreboard.accepted_from),
        workers=[
            report_of_worker(numbers, now, leaving=leaving) for numbers in scoreboard.workers()
        ],
        counters=scoreboard.totals() | scoreboard.events(),
        limit=limit,
        peak=scoreboard.peak(),
        configuration=path or "",
        loaded=daemon[LOADED] / 1_000_000,
        current=file_identity(path) == loaded != (0, 0) if path else None,
        last_reload=daemon[LAST_RELOAD] / 1_000_000,
        last_reload_failed=bool(daemon[LAST_RELOAD_FAILED]),
        leaving=leaving,
    )
