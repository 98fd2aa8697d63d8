"""An upgrade that removes Python's library, and the daemon's, underneath a running daemon."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import sdnotify

from integration.daemon import ROOT, Daemon
from integration.scraper import get
from integration.service import Service
from waiting import until

#: Python imports it as its sitecustomize: at SIGUSR1, the supervisor logs a traceback, for which
#: Python looks for similar names.
LOGS_A_TRACEBACK = """
import logging
from tcpupperd.processes.supervisor import Supervisor

def log_traceback(self):
    try:
        self._fleat
    except AttributeError:
        logging.exception("from the test")

Supervisor._log_counters = log_traceback
"""


class Library:
    """All that a daemon imports, in a place of its own: links in a directory, to be removed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        standard, packages = Path(os.__file__).parent, directory / "packages"
        (directory / "lib").mkdir(parents=True)
        (directory / "lib" / standard.name).symlink_to(standard)
        packages.mkdir()
        (packages / "sitecustomize.py").write_text(LOGS_A_TRACEBACK)
        for package in (ROOT / "outlive", ROOT / "tcpupperd", Path(sdnotify.__file__).parent):
            (packages / package.name).symlink_to(package)
        self._environment = {
            "PYTHONHOME": directory,
            "PYTHONPATH": packages,
            "PYTHONSAFEPATH": "1",
            "PYTHONNOUSERSITE": "1",
        }

    def daemon(self, service: Service, metrics: socket.socket) -> Daemon:
        """A daemon that uses this library and no other."""
        names = {service.name: service.listener, "metrics": metrics} | service.manager.stored
        environment = [f"{name}={value}" for name, value in self._environment.items()]
        daemon = Daemon(
            manager=service.manager,
            passed=list(names.items()),
            wrapper=["env", *environment],
            max_connections=100,  # so few that no limit of descriptors matters
        )
        daemon.ended_by = signal.SIGUSR2
        # The one of a virtual environment would also find the packages there.
        base: str = sys._base_executable  # type: ignore[attr-defined]
        daemon.command[daemon.command.index("-m") - 1] = base
        return daemon

    def remove(self) -> None:
        """Remove it; nothing can be imported any more."""
        self._directory.rename(self._directory.with_name("removed"))


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


def test_running_daemon_needs_nothing_of_its_library(service: Service, library: Library) -> None:
    with socket.create_server(("127.0.0.1", 0)) as metrics:
        with library.daemon(service, metrics) as daemon:
            assert service.connect().ask(b"one") == b"ONE"
            library.remove()
            serve_all(daemon, f"127.0.0.1:{metrics.getsockname()[1]}")
            clients = [service.connect() for _ in range(20)]
            for client in clients:
                client.send(b"half a ")
            slow = service.connect(4096)
            unread = daemon.clog(slow)
            daemon.reload(log_level="debug", idle_timeout=100)
            idle = service.connect()
            assert idle.ask(b"two") == b"TWO"
            daemon.stop(signal.SIGUSR2)
            assert "ModuleNotFoundError" not in daemon.log
        with service.daemon():
            assert idle.ask(b"three") == b"THREE"
            assert [client.ask(b"line") for client in clients] == [b"HALF A LINE"] * 20
            slow.end()
            assert slow.read_to_end() == unread.upper()


def serve_all(daemon: Daemon, metrics: str) -> None:
    """Have the daemon do all that it does while it is running."""
    worker = daemon.workers()[0]
    os.kill(worker, signal.SIGKILL)
    daemon.wait_for_workers(2, without=worker)
    assert get(metrics)[0] == 200
    assert get(metrics, "/")[0] == 200
    daemon.configure("idle_timout = 5\n")
    daemon.send_signal(signal.SIGHUP)
    until(lambda: "did you mean idle_timeout?" in daemon.log)
    daemon.configure("this is not TOML")
    daemon.send_signal(signal.SIGHUP)
    until(lambda: "invalid TOML" in daemon.log)
    daemon.send_signal(signal.SIGUSR1)
    until(lambda: "AttributeError: " in daemon.log)


def test_daemon_without_its_library_can_be_stopped(service: Service, library: Library) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as metrics,
        library.daemon(service, metrics) as daemon,
    ):
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        library.remove()
        daemon.stop()  # which lingers, because the client does not close its side
        assert client.read_to_end() == b""
        assert "ModuleNotFoundError" not in daemon.log
