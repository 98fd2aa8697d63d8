"""`tcpupperd --reload`: it waits for the outcome of the reload, and reports it."""

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration.daemon import COMMAND, ROOT, Daemon
from integration.service import Service
from waiting import DEADLINE, until


def command(pid: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, "--reload", str(pid)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def reload(pid: object) -> tuple[int, str]:
    """The exit status and the messages."""
    with command(pid) as process:
        _, messages = process.communicate(timeout=2 * DEADLINE)
        return process.returncode, messages


def reloads(daemon: Daemon) -> tuple[int, int]:
    """The numbers of reloads that succeeded and that failed."""
    counters = daemon.counters()
    return counters["reloads_success"], counters["reloads_failure"]


def test_clients_are_served_with_the_new_settings_once_it_has_ended() -> None:
    with Daemon() as daemon:
        for number in range(5):
            daemon.configure(greeting=f"greeting {number}")
            assert reload(daemon.pid) == (0, "")
            assert daemon.connect().read_line() == b"greeting %d\n" % number
        assert reloads(daemon) == (5, 0)


def test_invalid_file_is_a_failure_that_is_counted_and_not_asked_for_again() -> None:
    with Daemon() as daemon:
        daemon.configure("max_lines = 3\n")
        failed = (1, "tcpupperd: the reload failed; see the log of the daemon\n")
        assert reload(daemon.pid) == failed
        assert reloads(daemon) == (0, 1)
        until(lambda: "the last reload failed" in daemon.manager.status)
        assert "changed on disk" not in daemon.manager.status
        daemon.configure("max_lines = 4\n")
        daemon.send_signal(signal.SIGCHLD)  # the supervisor checks
        until(lambda: "changed on disk; reload" in daemon.manager.status)


def test_workers_that_cannot_start_are_a_failure(service: Service) -> None:
    with service.daemon(wrapper=("prlimit", "--nofile=64")) as daemon:
        daemon.configure(workers=64)
        assert reload(daemon.pid)[0] == 1
        assert reloads(daemon) == (0, 1)


def test_several_at_the_same_time_are_all_answered() -> None:
    with Daemon() as daemon, ThreadPoolExecutor() as pool:
        results = pool.map(reload, [daemon.pid] * 4)
        assert list(results) == [(0, "")] * 4


def test_daemon_that_is_about_to_stop_does_not_reload() -> None:
    with Daemon(shutdown_delay=600) as daemon:
        daemon.send_signal(signal.SIGTERM)
        daemon.manager.wait("STOPPING=1")
        assert reload(daemon.pid)[0] == 1
        daemon.send_signal(signal.SIGTERM)


def test_daemon_that_exits_meanwhile_is_none_to_wait_for() -> None:
    """The next one reads the file."""
    sleeper = subprocess.Popen(["sleep", "600"])
    os.kill(sleeper.pid, signal.SIGSTOP)
    with command(sleeper.pid) as process:
        until(lambda: is_pending(sleeper.pid, signal.SIGHUP))
        sleeper.kill()
        _, messages = process.communicate(timeout=DEADLINE)
    sleeper.wait()
    assert process.returncode == 0
    assert f"there is no process {sleeper.pid}; a new one reads the configuration" in messages
    assert reload(sleeper.pid) == (0, messages)


def is_pending(pid: int, number: int) -> bool:
    text = Path(f"/proc/{pid}/status").read_text()
    [pending] = re.findall("^ShdPnd:\t([0-9a-f]+)$", text, re.M)
    return bool(int(pending, 16) >> (number - 1) & 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may signal any process")
def test_process_of_another_user() -> None:
    status, messages = reload(1)
    assert status == 1
    assert "cannot signal process 1, which belongs to another user" in messages


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--reload", "0"], "argument --reload: '0' is not a process ID"),
        (["--reload", "none"], "argument --reload: 'none' is not a process ID"),
        (["--reload", "1", "--check"], "--reload cannot be used together with --check"),
    ],
)
def test_usage_errors(arguments: list[str], complaint: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr.decode()
