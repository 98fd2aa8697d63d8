"""`tcpupperd --daemonize`, as a whole."""

import contextlib
import ctypes
import os
import pwd
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.background import ROOT, needs_root
from waiting import DEADLINE, until


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Become the parent of daemons whose launcher has exited, in order to see their exit
    status."""
    pr_set_child_subreaper = 36  # prctl(2)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(pr_set_child_subreaper, 0, 0, 0, 0)


def command(python: str, *arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
    """Run tcpupperd or tcpupper; return its status and what it printed."""
    done = subprocess.run(
        [python, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def tcpupperd(python: str, directory: Path, *options: str) -> Iterator[int]:
    """Run the daemon in the background, at ``directory``/socket; yield its process number."""
    arguments = ["--daemonize", "--pid-file", "pid", "--listen", str(directory / "socket")]
    with adopting_orphans():
        assert command(python, "tcpupperd", *arguments, *options, cwd=directory) == (0, "")
        pid = int((directory / "pid").read_text())
        pidfd = os.pidfd_open(pid)
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            os.close(pidfd)


def ask(python: str, directory: Path, *text: str) -> tuple[int, str]:
    return command(python, "tcpupperd.client", "--unix", str(directory / "socket"), *text)


def test_tcpupperd_serves_when_its_launcher_ends_and_stops_with_status_0(
    python: str, tmp_path: Path
) -> None:
    with tcpupperd(python, tmp_path) as pid:
        assert ask(python, tmp_path, "hello") == (0, "HELLO\n")
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not (tmp_path / "pid").exists()


def test_second_tcpupperd_is_refused(python: str, tmp_path: Path) -> None:
    with tcpupperd(python, tmp_path) as pid:
        arguments = ["tcpupperd", "--daemonize", "--pid-file", str(tmp_path / "pid")]
        status, message = command(python, *arguments)
        assert status == 1
        assert f"tcpupperd is already running as process {pid};" in message
        assert ask(python, tmp_path, "hello") == (0, "HELLO\n")


def test_tcpupperd_that_cannot_listen_says_so_on_the_terminal(python: str, tmp_path: Path) -> None:
    with tcpupperd(python, tmp_path):
        arguments = ["tcpupperd", "--daemonize", "--listen", str(tmp_path / "socket")]
        status, message = command(python, *arguments)
    assert status == 71
    assert f"cannot listen on {tmp_path / 'socket'}: Address already in use" in message


@needs_root
def test_tcpupperd_serves_as_another_user(python: str, tmp_path: Path) -> None:
    probe = "import os; os.setuid(65534); import tcpupperd.cli"
    readable = subprocess.run([python, "-c", probe], cwd=ROOT, capture_output=True, check=False)
    if readable.returncode != 0:
        pytest.skip("Python or this checkout is where other users cannot read it")
    with tcpupperd(python, tmp_path, "--user", "nobody") as pid:
        assert os.stat(f"/proc/{pid}").st_uid == pwd.getpwnam("nobody").pw_uid
        assert ask(python, tmp_path, "hello") == (0, "HELLO\n")


def test_tcpupperd_finds_its_configuration_again(python: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("lines_per_connection = 1\n")
    two_lines = "one\ntwo"
    with tcpupperd(python, tmp_path, "--config", file.name) as pid:
        assert ask(python, tmp_path, two_lines)[0] == 1
        file.write_text("lines_per_connection = 2\n")
        os.kill(pid, signal.SIGHUP)
        until(lambda: ask(python, tmp_path, two_lines)[0] == 0)


def test_tcpupperd_refuses_to_daemonize_with_sockets_that_were_passed_in(
    python: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shell = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&"$0"'
        arguments = ["-m", "tcpupperd", "--daemonize", "--pid-file", str(tmp_path / "pid")]
        done = subprocess.run(
            ["bash", "-c", shell, str(listener.fileno()), python, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
            pass_fds=[listener.fileno()],
        )
    if done.returncode == 0:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert done.returncode == 1
    assert "--daemonize: a service manager started this process (LISTEN_PID=" in done.stderr
