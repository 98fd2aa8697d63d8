"""The daemon in the foreground: its terminal, its output, and what it leaves at its end."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from integration.daemon import COMMAND, ROOT, Daemon
from integration.manager import Manager
from integration.processes import marked
from integration.tcpupper import CLIENT, closed_pipe, full
from integration.terminal import Terminal
from waiting import until

# Its terminal


class Foreground:
    """A daemon at a terminal, started by a command that contains {daemon}."""

    def __init__(self, directory: Path) -> None:
        self._mark = f"TEST_DIRECTORY={directory}"
        self._log = directory / "log"
        self._pid = directory / "pid"
        daemon = shlex.join([*COMMAND, "--listen=127.0.0.1:0", "--workers=1"])
        # The process ID of the shell is that of the daemon.
        self._script = directory / "start"
        self._script.write_text(
            f"cd {ROOT}; echo $$ >{self._pid}; export {self._mark}; exec {daemon} 2>{self._log}\n"
        )

    @property
    def command(self) -> str:
        """The command that starts it."""
        return f"sh {self._script}"

    @property
    def log(self) -> str:
        """What it wrote to standard error."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def pid(self) -> int:
        """Its main process."""
        return int(self._pid.read_text())

    def wait_until_ready(self) -> None:
        """Wait until it serves."""
        until(lambda: "ready: " in self.log)

    def wait_for_end(self) -> None:
        """Wait until none of its processes is left."""
        until(lambda: not marked(self._mark))

    def kill(self) -> None:
        """Kill all its processes."""
        for pid in marked(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def foreground(tmp_path: Path) -> Iterator[Foreground]:
    """A daemon that a test starts."""
    daemon = Foreground(tmp_path)
    yield daemon
    daemon.kill()


@pytest.mark.parametrize(
    "start",
    ["{}", "sh -c '{}; true'", "bash -i -c '{}; true'", "bash -i -c '{} & wait'"],
    ids=["alone", "from a script", "from a shell", "from a shell, in the background"],
)
def test_daemon_stops_when_its_terminal_is_closed(start: str, foreground: Foreground) -> None:
    command = shlex.split(start.format(foreground.command))
    with Terminal() as terminal, terminal.running(command):
        foreground.wait_until_ready()
        terminal.close()
        foreground.wait_for_end()
    assert "the terminal was closed; stopping" in foreground.log
    assert "stopping: closing 0 connections" in foreground.log
    assert "immediately" not in foreground.log  # each of the signals counts once


def test_daemon_outlives_its_terminal_if_it_is_told_to(foreground: Foreground) -> None:
    command = ["sh", "-c", f"exec nohup {foreground.command} >/dev/null"]
    with Terminal() as terminal, terminal.running(command):
        foreground.wait_until_ready()
        terminal.close()
        until(lambda: "reloaded: " in foreground.log)
        os.kill(foreground.pid, signal.SIGTERM)
        foreground.wait_for_end()


def test_hangup_by_a_user_means_reload(foreground: Foreground) -> None:
    with Terminal() as terminal, terminal.running(["bash", "--norc", "-i"]):
        terminal.type(f"{foreground.command} &\n")
        foreground.wait_until_ready()
        terminal.type("kill -HUP $!\n")  # which is sent by the shell itself
        until(lambda: foreground.log.count("reloaded: ") == 1)
        os.kill(foreground.pid, signal.SIGHUP)
        until(lambda: foreground.log.count("reloaded: ") == 2)
        terminal.type("kill $!\n")
        foreground.wait_for_end()


def test_hangup_by_the_parent_without_a_terminal_means_reload() -> None:
    """As a service manager or the init of a container sends it."""
    with Daemon(wrapper=["setsid"]) as daemon:
        daemon.reload()
        assert daemon.process.poll() is None


# Its output


@pytest.mark.parametrize("output", [closed_pipe, full])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ([*COMMAND, "--check"], 1),
        ([*COMMAND, "--check", "--verbose"], 1),
        ([*COMMAND, "--version"], 1),
        ([*COMMAND, "--help"], 1),
        ([*CLIENT, "--version"], 1),
        ([*CLIENT, "--ping", "--help"], 1),
        ([*CLIENT, "--check", "--help"], 3),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_output_that_cannot_be_written(
    command: Sequence[str], status: int, output: Callable[[], int]
) -> None:
    descriptor = output()
    done = subprocess.run(
        command, cwd=ROOT, stdout=descriptor, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(descriptor)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1
    assert "cannot write standard output: " in done.stderr


@pytest.mark.parametrize("option", ["--version", "--help"])
@pytest.mark.parametrize("command", [COMMAND, CLIENT], ids=["daemon", "client"])
def test_closed_output_is_no_success(command: Sequence[str], option: str) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command, option],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if command is CLIENT:
        assert done.returncode == 1
        assert "standard output is closed" in done.stderr
    else:  # for it, a closed stream is the null device
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("errors", [closed_pipe, full])
def test_check_does_not_depend_on_standard_error(errors: Callable[[], int]) -> None:
    descriptor = errors()
    done = subprocess.run(
        [*COMMAND, "--check", "--listen=9999"], cwd=ROOT, stderr=descriptor, check=False
    )
    os.close(descriptor)
    assert done.returncode == 0


# What it leaves

WARNINGS = ("env", "PYTHONDEVMODE=1")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGUSR2])
def test_nothing_is_unclosed_at_a_stop(stop: int, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with Daemon(wrapper=WARNINGS, listen=[path, "127.0.0.1:0"]) as daemon:
        assert daemon.connect().ask(b"hello") == b"HELLO"
        daemon.reload(listen=["127.0.0.1:0"])
        daemon.stop(stop)
        assert "Warning" not in daemon.log


def test_nothing_is_unclosed_at_a_failed_start(tmp_path: Path) -> None:
    with Manager(str(tmp_path / "notify"), store=True) as manager:
        nowhere = ["127.0.0.1:0", "/nonexistent/socket"]
        status, log = Daemon(wrapper=WARNINGS, listen=nowhere, manager=manager).run()
        assert (status, len(log.splitlines())) == (71, 1), log


def test_nothing_is_unclosed_if_sockets_were_passed(tmp_path: Path) -> None:
    with (
        Manager(str(tmp_path / "notify"), store=True) as manager,
        socket.create_server(("127.0.0.1", 0)) as one,
    ):
        options = ("--config", str(tmp_path / "missing"))
        daemon = Daemon(*options, wrapper=WARNINGS, passed=[("upper", one)], manager=manager)
        status, log = daemon.run()
        assert (status, len(log.splitlines())) == (78, 1), log
