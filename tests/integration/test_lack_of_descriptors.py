"""Processes without a free descriptor: what needs one is left out, and the log says so."""

import resource
import signal

import pytest

from integration.daemon import Daemon
from integration.processes import descriptors
from integration.service import Service
from waiting import until


def limit(pid: int, soft: int) -> None:
    """Set the limit of a running process, as prlimit(1) does."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(soft, hard), hard))


@pytest.mark.parametrize("count", range(6, 10))
def test_start_that_lacks_descriptors_is_no_bug(count: int) -> None:
    """With fewer, not even Python starts."""
    wrapper = ["prlimit", f"--nofile={count}"]
    status, log = Daemon(wrapper=wrapper, notify=False, workers=2).run()
    assert status in (1, 71)
    assert "LimitNOFILE= in the unit" in log
    assert "bug" not in log
    assert "Traceback" not in log


def test_supervisor_without_a_free_descriptor_keeps_serving(service: Service) -> None:
    with service.daemon() as daemon:
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        limit(daemon.pid, 1 + max(descriptors(daemon.pid)))
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "reload failed" in daemon.log)
        assert "Too many open files" in daemon.log
        assert client.ask(b"two") == b"TWO"
        limit(daemon.pid, 1000)
        daemon.reload()
        assert client.ask(b"three") == b"THREE"
        daemon.stop(signal.SIGUSR2)
        assert "bug" not in daemon.log
    with service.daemon():
        assert client.ask(b"four") == b"FOUR"


def test_worker_without_a_free_descriptor_closes_what_it_cannot_hand_over(
    service: Service,
) -> None:
    with service.daemon(workers=1) as daemon:
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        (worker,) = daemon.workers()
        limit(worker, 1)
        client.send(b"two\n")
        daemon.send_signal(signal.SIGUSR2)
        assert client.read_to_end() == b"TWO\n"
        client.close()
        assert daemon.wait() == 0
        assert "closing 1 connection that cannot be handed over" in daemon.log
        assert "LimitNOFILE= in the unit" in daemon.log
        assert "bug" not in daemon.log
