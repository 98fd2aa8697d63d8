"""The watchdog: the supervisor shows the service manager, and each worker the supervisor, that it
lives (sd_watchdog_enabled(3))."""

import os
import re
import signal
import statistics
import subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep

import pytest

from integration.daemon import Daemon
from integration.processes import stopped
from waiting import until


def test_pings_come_in_time() -> None:
    """At least from time to time: a machine may be too busy for that always."""
    interval = 2.0
    with Daemon(wrapper=watched(interval)) as daemon:
        pings: list[float] = []

        def are_in_time() -> bool:
            pings.append(daemon.manager.wait("WATCHDOG=1").when)
            gaps = [later - earlier for earlier, later in pairwise(pings[-6:])]
            return len(gaps) == 5 and interval / 8 <= statistics.median(gaps) <= interval / 2

        until(are_in_time)


def test_start_is_no_ping_late() -> None:
    with Daemon(wrapper=watched(600)) as daemon:
        daemon.manager.wait("STATUS=.*")
        assert daemon.manager.count("WATCHDOG=1") == 1


@pytest.mark.parametrize(
    "variables",
    [
        ("WATCHDOG_USEC=100000", "WATCHDOG_PID=1"),
        ("WATCHDOG_USEC=0",),
        ("WATCHDOG_USEC=soon",),
        ("WATCHDOG_USEC=100000", "WATCHDOG_PID=us"),
        ("WATCHDOG_USEC=-100000",),
    ],
)
def test_no_pings_unless_asked_for(variables: tuple[str, ...]) -> None:
    with Daemon(wrapper=("env", *variables)) as daemon:
        daemon.reload()
        daemon.stop()
        daemon.manager.wait("STOPPING=1")
        assert not daemon.manager.count("WATCHDOG=1")


def test_pings_stop_with_the_supervisor() -> None:
    with Daemon(wrapper=watched(2)) as daemon:
        with stopped(daemon.pid):
            pings = daemon.manager.count("WATCHDOG=1")
            # The workers, which continue, do not ping in its place.
            client = daemon.connect()
            end = monotonic() + 1.5  # in which two would be due
            while monotonic() < end:
                assert client.ask(b"hello") == b"HELLO"
            assert daemon.manager.count("WATCHDOG=1") <= pings + 1  # one may have been on its way
        daemon.manager.wait("WATCHDOG=1")


def test_stuck_worker_is_replaced() -> None:
    with Daemon(wrapper=watched(5)) as daemon:
        stuck, other = daemon.workers()
        os.kill(stuck, signal.SIGSTOP)
        daemon.wait_for_workers(2, without=stuck)
        assert daemon.log.count(f"worker {stuck} is not responding") == 1
        assert f"worker {stuck} was killed because it was not responding" in daemon.log
        assert "out of memory" not in daemon.log
        assert other in daemon.workers()
        assert daemon.connect().ask(b"hello") == b"HELLO"
        counters = daemon.counters()
        assert (counters["workers_died_hung"], counters["workers_died_signal"]) == (1, 0)


def test_service_that_was_suspended_as_a_whole_continues() -> None:
    with Daemon(wrapper=watched(2)) as daemon:
        workers = daemon.workers()
        for _ in range(2):
            with stopped(daemon.pid, *workers):  # they continue in this order
                sleep(3)
            for _ in range(4):
                daemon.manager.wait("WATCHDOG=1")
        assert daemon.workers() == workers
        assert "is not responding" not in daemon.log


def test_idle_and_busy_workers_both_live() -> None:
    with Daemon(wrapper=watched(2)) as daemon:
        workers = daemon.workers()
        client = daemon.connect()
        while daemon.manager.count("WATCHDOG=1") < 6:
            assert client.ask(b"hello") == b"HELLO"
        assert daemon.workers() == workers
        assert "is not responding" not in daemon.log


def test_worker_outlives_the_abort_of_the_watchdog() -> None:
    """The service manager, here this process, sends it to all processes of the service."""
    with Daemon(wrapper=watched(2)) as daemon:
        workers = daemon.workers()
        for worker in workers:
            os.kill(worker, signal.SIGABRT)
            until(partial(has_received, worker, signal.SIGABRT))
        assert daemon.connect().ask(b"hello") == b"HELLO"
        assert daemon.workers() == workers


@pytest.mark.parametrize("interval", [0, 2])
def test_worker_that_anyone_else_aborts_dies(interval: float) -> None:
    with Daemon(wrapper=watched(interval), workers=1) as daemon:
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        (worker,) = daemon.workers()
        subprocess.run(["sh", "-c", f"kill -ABRT {worker}"], check=True)
        daemon.wait_for_workers(1, without=worker)
        assert f"worker {worker} was killed by signal 6 (Aborted)" in daemon.log
        assert client.ask(b"two") == b"TWO"


def has_received(pid: int, number: int) -> bool:
    """Whether a signal that was sent to a process is not pending any more."""
    found = re.search(
        r"^ShdPnd:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    assert found
    return not int(found[1], 16) >> number - 1 & 1


def watched(seconds: float) -> tuple[str, ...]:
    """A command that requests keep-alive notifications within this many seconds."""
    return ("env", f"WATCHDOG_USEC={int(seconds * 1_000_000)}")
