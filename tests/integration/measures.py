"""The resources that daemons use, how fast they answer, and for how long a test measures this."""

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from integration.client import Client

Number = TypeVar("Number", int, float)

#: Whether the long forms run: `make soak`.
SOAK = bool(os.environ.get("SOAK"))


def scaled(short: Number, full: Number) -> Number:
    """How many, or how long: for every run of the tests, or for `make soak`."""
    return full if SOAK else short


def cpu_seconds(pids: Iterable[int]) -> float:
    """The CPU time that processes have used, to the nanosecond (proc(5), schedstat)."""
    used = (Path(f"/proc/{pid}/schedstat").read_text().split()[0] for pid in pids)
    return sum(int(nanoseconds) for nanoseconds in used) / 1e9


def cpu_share(pids: Iterable[int], seconds: float) -> float:
    """The part of one CPU that processes use in the next `seconds`."""
    pids = list(pids)
    before, began = cpu_seconds(pids), time.monotonic()
    time.sleep(seconds)  # what is measured, not a wait
    return (cpu_seconds(pids) - before) / (time.monotonic() - began)


def private_kib(pids: Iterable[int]) -> int:
    """The memory that processes share with no others."""
    return sum(_private_kib(pid) for pid in pids)


def _private_kib(pid: int) -> int:
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private"))


def anonymous_kib(pid: int) -> int:
    """The memory that a process has written to, shared with forked ones or not."""
    found = re.search(r"^RssAnon:\s+([0-9]+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found
    return int(found[1])


def answer_times(client: Client, count: int) -> list[float]:
    """The seconds that each of this many answers takes, shortest first."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        assert client.ask(b"how long?") == b"HOW LONG?"
        times.append(time.perf_counter() - began)
    return sorted(times)


def percentile(times: list[float], percent: float) -> float:
    """The time that this percentage of sorted times do not exceed."""
    return times[min(len(times) - 1, int(len(times) * percent / 100))]
