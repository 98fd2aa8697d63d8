"""What needs no service manager to be tested; the rest talks to a real socket."""

import os

import pytest

from outlive.notify import Notifier, watchdog_interval

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
