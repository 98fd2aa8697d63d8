"""A small program that goes to the background and does what it is told over its socket."""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from waiting import DEADLINE

ROOT = Path(__file__).parents[2]
PIPE = subprocess.PIPE

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user")

PROGRAM = """
import json, os, resource, signal, socket, sys
from tcpupperd.host import background

def describe():
    links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{fd}")}
    umask = os.umask(0)
    os.umask(umask)
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
        has_terminal = True
    except OSError:
        has_terminal = False
    return {
        "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0),
        "directory": os.getcwd(), "umask": umask, "user": os.getresuid(),
        "group": os.getresgid(), "groups": sorted(os.getgroups()), "files": links,
        "core": resource.getrlimit(resource.RLIMIT_CORE), "terminal": has_terminal,
        "terminates_by_default": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }

def obey(command, daemon):
    match command:
        case "ready":
            daemon.ready()
        case "fail":
            daemon.failed(78, "cannot serve: no reason given")
            sys.exit(78)
        case "stumble":
            raise ZeroDivisionError("no answer")
        case "die":
            os._exit(9)
        case "stop":
            sys.exit()
        case "let a fork end":
            if os.fork() == 0:
                sys.exit()
            os.wait()
        case "leave a worker":
            if os.fork() == 0:  # until the test closes its connection
                connection.recv(1, socket.MSG_PEEK)
                os._exit(0)
    return describe()

background.open_standard_streams()
pid_file, user, group = json.loads(sys.argv[1])
try:
    with background.Background(pid_file, user, group) as daemon:
        listener = socket.create_server(("127.0.0.1", 0))
        stray = open("/dev/zero")
        print(listener.getsockname()[1], flush=True)
        daemon.detach([listener])
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as lines:
                for line in lines:
                    print(json.dumps(obey(line.strip(), daemon)), file=lines, flush=True)
except background.BackgroundError as error:
    print(f"tcpupperd: {error}", file=sys.stderr)
    sys.exit(1)
"""


def daemon_versions() -> dict[str, str]:
    """Return an interpreter for each version of python-daemon that is installed."""
    ask = "import daemon, importlib.metadata as m; print(m.version('python-daemon'))"
    found: dict[str, str] = {}
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(FileNotFoundError):
            asked = subprocess.run(
                [python, "-c", ask], capture_output=True, text=True, check=False
            )
            if asked.returncode == 0:
                found.setdefault(asked.stdout.strip(), python)
    return found


VERSIONS = daemon_versions()


class Daemon:
    """The connection to a daemon; each command is answered by its description of itself."""

    def __init__(self, port: int) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.answers = self.connection.makefile("r")
        self.state = self.tell("describe")
        self.pidfd = os.pidfd_open(self.state["pid"])

    def tell(self, command: str) -> dict[str, Any]:
        self.connection.sendall(command.encode() + b"\n")
        answer = self.answers.readline()
        return dict(json.loads(answer)) if answer else {}

    def wait(self) -> None:
        """Wait until the process has ended."""
        assert select.select([self.pidfd], [], [], DEADLINE)[0]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        self.kill()
        os.close(self.pidfd)
        self.answers.close()
        self.connection.close()


class Launch:
    """A launcher on a terminal of its own, and its daemon when it got so far."""

    def __init__(
        self,
        python: str,
        pid_file: Path | None = None,
        user: str | None = None,
        group: str | None = None,
        redirections: str = "",
    ) -> None:
        arguments = json.dumps([pid_file and str(pid_file), user, group])
        self.terminal, its_side = os.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(its_side, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {redirections}', "sh", python, "-c", PROGRAM, arguments],
            cwd=ROOT,
            stdin=its_side,
            stdout=PIPE,
            stderr=PIPE,
            text=True,
            preexec_fn=take_terminal,  # noqa: PLW1509  (no thread runs here)
        )
        os.close(its_side)
        assert self.process.stdout is not None
        port = self.process.stdout.readline()
        self.daemon = Daemon(int(port)) if port else None

    def end(self) -> tuple[int, str]:
        """Return the launcher's exit status and its messages, once no process can write more."""
        _, messages = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, messages

    def close(self) -> None:
        if self.daemon is not None:
            self.daemon.close()
        self.process.kill()
        self.process.communicate()
        os.close(self.terminal)


@contextlib.contextmanager
def launched(*arguments: Any, **options: Any) -> Iterator[Launch]:
    launch = Launch(*arguments, **options)
    try:
        yield launch
    finally:
        launch.close()


@contextlib.contextmanager
def running(*arguments: Any, **options: Any) -> Iterator[Daemon]:
    """Launch a daemon and let it say that it is ready."""
    with launched(*arguments, **options) as launch:
        assert launch.daemon is not None, launch.end()
        launch.daemon.tell("ready")
        assert launch.end() == (0, "")
        yield launch.daemon


def refusal(*arguments: Any, **options: Any) -> str:
    """Return the message of a launcher that did not start a daemon."""
    with launched(*arguments, **options) as launch:
        assert launch.daemon is None
        status, message = launch.end()
    assert status == 1
    assert message.startswith("tcpupperd: ")
    assert message.count("\n") == 1
    return message
