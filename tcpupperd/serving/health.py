"""What probes and load balancers ask over HTTP: `/ready` and `/live`.

A server that is full is alive: restarting it would end its connections, and help nobody. It should
only be sent no new clients.
"""

from __future__ import annotations

from tcpupperd.serving.http import Page
from tcpupperd.serving.report import Report, WorkerReport

#: Seconds without a heartbeat after which a worker is suspected to hang; a healthy one, busy or
#: idle, stays far below it.
HEARTBEAT_WARNING = 10.0


def is_silent(worker: WorkerReport) -> bool:
    """Whether a worker may be hanging."""
    return worker.since_heartbeat is not None and worker.since_heartbeat > HEARTBEAT_WARNING


def obstacle(report: Report) -> str:
    """Why new clients should go to another server; "" if they are welcome here."""
    if report.leaving:
        return "leaving"
    if not any(one.state == "serving" and not is_silent(one) for one in report.workers):
        return "no live worker"
    if report.limit and report.clients >= report.limit:
        return "full"
    return ""


def ready(report: Report) -> Page:
    """Whether new clients are welcome."""
    problem = obstacle(report)
    return _page(problem or "ready", 503 if problem else 200)


def live() -> Page:
    """That an event loop answers."""
    return _page("live")


def _page(text: str, status: int = 200) -> Page:
    return Page("text/plain; charset=utf-8", f"{text}\n", status=status)
