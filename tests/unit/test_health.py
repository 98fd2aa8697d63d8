"""Whether new clients are welcome, by the report."""

import pytest

from tcpupperd.serving.health import HEARTBEAT_WARNING, live, obstacle, ready
from tcpupperd.serving.report import Report, WorkerReport
from unit.reports import REPORT

SERVING = WorkerReport(1, "serving", 10, 0, 0, 60.0, 0.1, 0.0, 0.0)
HUNG = SERVING._replace(since_heartbeat=HEARTBEAT_WARNING + 1)


def of(*workers: WorkerReport, leaving: bool = False) -> Report:
    return REPORT._replace(workers=list(workers), limit=20, leaving=leaving)


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        (of(SERVING), ""),
        (of(SERVING._replace(since_heartbeat=None)), ""),
        (of(SERVING, HUNG._replace(connections=9)), ""),
        (of(SERVING, SERVING), "full"),
        (of(SERVING, SERVING._replace(privileged=1)), ""),
        (of(SERVING, SERVING)._replace(limit=0), ""),
        (of(HUNG), "no live worker"),
        (of(SERVING._replace(state="starting")), "no live worker"),
        (of(SERVING._replace(state="exiting")), "no live worker"),
        (of(), "no live worker"),
        (of(SERVING._replace(state="leaving"), leaving=True), "leaving"),
        (of(leaving=True), "leaving"),
    ],
)
def test_obstacle(report: Report, problem: str) -> None:
    assert obstacle(report) == problem
    page = ready(report)
    assert (page.status, page.text) == (503 if problem else 200, f"{problem or 'ready'}\n")


def test_live() -> None:
    assert (live().status, live().text) == (200, "live\n")
