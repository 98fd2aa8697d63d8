"""The wall clock is set forward or back by an hour: no deadline comes early or late."""

import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from integration.daemon import Daemon
from tools import need
from waiting import until

SOURCE = Path(__file__).with_name("wall_clock.c")
HOUR = 3600
#: Seconds; in half of them, a busy machine opens the connections.
TIMEOUT = 6.0

#: Seconds between warnings that clients can cause.
QUIET = 10


class WallClock:
    """The wall clock of the daemons that are started under it."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "offset"
        self._file.write_bytes(bytes(8))
        library = directory / "wall_clock.so"
        compiler = need("cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        self.wrapper = ("env", f"LD_PRELOAD={library}", f"WALL_CLOCK={self._file}")

    def set(self, offset: int) -> None:
        """Set it to this many seconds before or after the time of the machine."""
        # In place: it is mapped.
        with self._file.open("r+b") as file:
            file.write(struct.pack("q", offset))


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


def set_by_an_hour(daemon: Daemon, clock: WallClock, offset: int) -> None:
    """Set the clock, and see that the daemon sees it: its log has the time."""
    clock.set(offset)
    daemon.counters()
    said = time.strptime(daemon.log.splitlines()[-1][:19], "%Y-%m-%d %H:%M:%S")
    assert abs(time.mktime(said) - time.time() - offset) < HOUR / 2


@pytest.mark.parametrize("offset", [HOUR, -HOUR])
def test_timeouts(clock: WallClock, offset: int) -> None:
    timeouts: dict[str, Any] = {"idle_timeout": TIMEOUT, "write_timeout": TIMEOUT}
    timeouts["line_timeout"] = TIMEOUT / 2
    with Daemon(workers=1, wrapper=clock.wrapper, **timeouts) as daemon:
        began = time.monotonic()
        daemon.clog(daemon.connect(receive_buffer=8192))
        daemon.connect().send(b"no newline")
        daemon.connect()
        set_by_an_hour(daemon, clock, offset)
        assert daemon.counters()["open"] == 3
        until(lambda: min(daemon.counters()[setting] for setting in timeouts) == 1)
        assert time.monotonic() - began >= TIMEOUT


@pytest.mark.parametrize("offset", [HOUR, -HOUR])
def test_drain_timeout(clock: WallClock, offset: int) -> None:
    with Daemon(workers=1, wrapper=clock.wrapper, drain_timeout=TIMEOUT) as daemon:
        daemon.clog(daemon.connect(receive_buffer=8192))
        began = time.monotonic()
        daemon.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in daemon.log)
        clock.set(offset)
        assert daemon.wait() == 0
        assert time.monotonic() - began >= TIMEOUT
        assert "killing" not in daemon.log


@pytest.mark.parametrize("offset", [HOUR, -HOUR])
def test_watchdog(clock: WallClock, offset: int) -> None:
    wrapper = (*clock.wrapper, "WATCHDOG_USEC=8000000")
    with Daemon(workers=2, wrapper=wrapper) as daemon:
        workers = daemon.workers()
        set_by_an_hour(daemon, clock, offset)
        count = daemon.manager.count("WATCHDOG=1")
        until(lambda: daemon.manager.count("WATCHDOG=1") >= count + 4)
        assert daemon.workers() == workers


def test_warnings_that_clients_can_cause(clock: WallClock) -> None:
    with Daemon(wrapper=clock.wrapper, workers=1, max_connections_per_source=1) as daemon:
        began = time.monotonic()
        assert daemon.connect().ask(b"one") == b"ONE"
        assert daemon.connect().read_to_end() == b""
        set_by_an_hour(daemon, clock, HOUR)
        assert daemon.connect().read_to_end() == b""
        assert daemon.counters()["source_limit"] == 2
        assert daemon.log.count("refused another") <= 1 + (time.monotonic() - began) // QUIET
