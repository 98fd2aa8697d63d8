"""Going to the background: real launchers and daemons, each python-daemon that is installed."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.background import ROOT, VERSIONS, launched, running
from tcpupperd.host import background


def test_both_supported_versions_are_tested_where_they_can_be_had() -> None:
    assert VERSIONS, "python-daemon is not installed"


# What the daemon is


def test_daemon_has_left_terminal_session_directory_and_files(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        state = launch.daemon.state
        launcher = launch.process.pid
    assert not state["terminal"]
    assert state["session"] not in (launcher, state["pid"])  # so it cannot get another terminal
    assert (state["directory"], state["umask"]) == ("/", 0o077)
    assert [state["files"][stream] for stream in "012"] == ["/dev/null"] * 3
    others = sorted(target.split(":")[0] for fd, target in state["files"].items() if int(fd) > 2)
    assert others == ["pipe", "socket", "socket"]  # to the launcher, the listener, the test


def test_daemon_keeps_no_way_to_the_launcher_once_ready(python: str) -> None:
    with running(python) as daemon:
        files = daemon.tell("describe")["files"].values()
    assert not [target for target in files if target.startswith("pipe:")]


def test_daemon_keeps_user_core_limit_and_signals(python: str) -> None:
    with running(python) as daemon:
        assert daemon.state["user"] == list(os.getresuid())
        assert daemon.state["group"] == list(os.getresgid())
        assert daemon.state["groups"] == sorted(os.getgroups())
        assert daemon.state["core"] == list(resource.getrlimit(resource.RLIMIT_CORE))
        assert daemon.state["terminates_by_default"]


def test_standard_streams_may_be_closed(python: str) -> None:
    with running(python, redirections="<&-") as daemon:
        assert [daemon.state["files"][stream] for stream in "012"] == ["/dev/null"] * 3


def test_open_standard_streams_takes_each_closed_number() -> None:
    program = (
        "import os; from tcpupperd.host.background import open_standard_streams as fill; fill();"
        "os.write(9, ' '.join(os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)).encode());"
        "import sys; print('nobody reads this'); sys.stderr.write('nor this'); sys.stdin.read()"
    )
    shell = 'exec 9>&1; exec "$@" <&- >&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "/dev/null /dev/null /dev/null"


# What the launcher says


def test_launcher_waits_until_the_daemon_is_ready(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        with pytest.raises(subprocess.TimeoutExpired):
            launch.process.wait(0.3)
        launch.daemon.tell("ready")
        assert launch.end() == (0, "")


def test_workers_forked_before_the_daemon_is_ready_hold_nothing_of_the_terminal(
    python: str,
) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        launch.daemon.tell("leave a worker")
        launch.daemon.tell("ready")
        assert launch.end() == (0, "")  # the pipes of its output have come to their end


def test_failed_start_reaches_the_terminal(python: str, tmp_path: Path) -> None:
    with launched(python, tmp_path / "pid") as launch:
        assert launch.daemon is not None
        launch.daemon.tell("fail")
        assert launch.end() == (78, "tcpupperd: cannot serve: no reason given\n")
        launch.daemon.wait()
    assert not (tmp_path / "pid").exists()


def test_death_before_ready_is_a_failed_start(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        launch.daemon.tell("die")
        assert launch.end() == (1, "tcpupperd: the daemon exited before it was ready\n")


def test_unexpected_error_reaches_the_terminal(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        launch.daemon.tell("stumble")
        message = (
            "tcpupperd: internal error; please report this bug: ZeroDivisionError('no answer')\n"
        )
        assert launch.end() == (1, message)


def test_failure_after_ready_is_not_the_launchers(python: str) -> None:
    with running(python) as daemon:
        daemon.tell("fail")
        daemon.wait()


def test_interrupted_launcher_leaves_the_daemon_alone(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        launch.process.send_signal(signal.SIGINT)
        assert launch.end() == (-signal.SIGINT, "")
        assert launch.daemon.tell("ready")["pid"] == launch.daemon.state["pid"]


# Service managers


@pytest.mark.parametrize(
    "environ", [{"NOTIFY_SOCKET": "/run/notify"}, {"LISTEN_PID": str(os.getpid())}]
)
def test_refused_under_a_service_manager(environ: dict[str, str]) -> None:
    with pytest.raises(background.BackgroundError, match=r"^--daemonize: a service manager"):
        background.require_no_service_manager(environ)


@pytest.mark.parametrize("environ", [{}, {"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1"}])
def test_variables_for_another_process_do_not_matter(environ: dict[str, str]) -> None:
    background.require_no_service_manager(environ)
