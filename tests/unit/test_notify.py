"""What needs no service manager to be tested; the rest talks to a real socket."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outlive.notify import SEND_TIMEOUT, Notifier, watchdog_interval

ME = str(os.getpid())


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "20000000"}, 20.0),
        ({"WATCHDOG_USEC": "1"}, 1e-6),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": ME}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": ""}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "me"}, 0.0),
        ({"WATCHDOG_PID": ME}, 0.0),
        ({"WATCHDOG_USEC": "0"}, 0.0),
        ({"WATCHDOG_USEC": "-5"}, 0.0),
        ({"WATCHDOG_USEC": ""}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({"WATCHDOG_USEC": "1.5"}, 0.0),
    ],
)
def test_watchdog_interval_by_sd_watchdog_enabled(environ: dict[str, str], seconds: float) -> None:
    assert watchdog_interval(environ) == pytest.approx(seconds)


def test_without_a_socket_there_is_no_service_manager() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000000"})
    assert not notifier.listening
    assert notifier.watchdog_interval == 0.0


def test_notifying_without_a_service_manager_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({})
    notifier.ready()
    notifier.reloading()
    notifier.stopping()
    notifier.status("nobody reads this")
    notifier.watchdog()
    notifier.extend_timeout(1.5)
    notifier.remove_descriptor("channel")
    assert caplog.records == []


def test_service_manager_that_does_not_read_delays_nothing_for_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What does not fit is dropped. Without a time limit, this test would never end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        while not caplog.messages:
            notifier.watchdog()
        assert not notifier.store_descriptor("channel", manager.fileno())
        assert manager.recv(100) == b"WATCHDOG=1"
    assert [one.rpartition(": ")[2] for one in caplog.messages] == ["timed out", "timed out"]
    assert SEND_TIMEOUT == 0.2  # as outlive/README.md says


def test_lack_of_descriptors_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    with no_descriptors():
        notifier.ready()
        assert not notifier.store_descriptor("channel", 0)
    assert len(caplog.messages) == 2
    assert all("LimitNOFILE=" in message for message in caplog.messages)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
