"""The running service: start, reload, restart, stop, and the deaths of its processes."""

import json
import re
import signal
import subprocess
from contextlib import ExitStack

import pytest

from system.container import Container
from system.service import (
    CONFIGURATION,
    SERVICE,
    SOCKET,
    Conversation,
    answer,
    drop_in,
    is_active,
    main_pid,
    workers,
)
from tcpupperd.events import Event
from waiting import DEADLINE, until

WRONG_CONFIGURATION = "workers = 'many'\n"
JOURNAL = "systemd-journald.service"

#: Messages that wait for a journal that does not read: systemd allows 512, where it may set
#: net.unix.max_dgram_qlen.
MORE_THAN_A_QUEUE = 1_000


def test_status_and_first_answer(machine: Container) -> None:
    for unit in (SERVICE, SOCKET):
        assert machine.run("systemctl", "is-enabled", unit) == "enabled"
        assert machine.run("systemctl", "is-active", unit) == "active"
    status = machine.run("systemctl", "status", "--full", SERVICE)
    assert "Active: active (running)" in status
    for worker in workers(machine):
        assert re.search(rf"\b{worker} .*tcpupperd: worker", status)
        assert f"tcpupperd: keeper of {worker}" in status
    assert answer(machine, "hello\n") == "HELLO"
    assert machine.run("tcpupper", "hello") == "HELLO"
    assert machine.run("systemctl", "is-system-running") == "running"


def test_several_simultaneous_clients(machine: Container) -> None:
    with ExitStack() as stack:
        conversations = [stack.enter_context(Conversation(machine)) for _ in range(5)]
        for number, conversation in enumerate(conversations):
            assert conversation.ask(f"line {number}") == f"LINE {number}"
        assert [conversation.end() for conversation in conversations] == [""] * 5


def test_connection_starts_the_stopped_service(machine: Container) -> None:
    machine.run("systemctl", "stop", SERVICE)
    assert answer(machine, "anyone?\n") == "ANYONE?"
    until(lambda: is_active(machine))


def test_reload_takes_a_good_file(machine: Container) -> None:
    pid, old_workers = main_pid(machine), workers(machine)
    machine.write(CONFIGURATION, "lines_per_connection = 1\n")
    machine.run("systemctl", "reload", SERVICE)
    until(lambda: not workers(machine) & old_workers)
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        assert conversation.end() == ""
    assert main_pid(machine) == pid


def test_reload_rejects_an_invalid_file(machine: Container) -> None:
    pid, old_workers = main_pid(machine), workers(machine)
    machine.write(CONFIGURATION, WRONG_CONFIGURATION + "wrokers = 1\n")
    reload = machine.try_run("systemctl", "reload", SERVICE)
    assert (main_pid(machine), workers(machine)) == (pid, old_workers)
    assert answer(machine, "still here\n") == "STILL HERE"
    # What the manual says is seen, and where.
    assert reload.returncode == 1
    assert reload.stdout.startswith(f"Job for {SERVICE} failed.\n")
    errors = [
        f'{CONFIGURATION}:1: workers = "many": must be',
        f"{CONFIGURATION}:2: wrokers: unknown setting; did you mean workers?",
    ]
    logged = machine.journal(f"--unit={SERVICE}", "--priority=err", "--output=cat").splitlines()
    status = machine.run("systemctl", "status", "--full", SERVICE)
    assert "Active: active (running)" in status
    for error in errors:
        assert any(f": {error}" in line for line in logged)
        assert error in status
    check = machine.try_run("tcpupperd", "--check", "--config", CONFIGURATION)
    assert check.returncode == 78
    for line, error in zip(check.stdout.splitlines(), errors, strict=True):
        assert line.startswith(f"tcpupperd: {error}")


def test_restart(machine: Container) -> None:
    pid, socket = main_pid(machine), machine.show(SOCKET, "InvocationID")
    machine.run("systemctl", "restart", SERVICE)
    assert main_pid(machine) not in (0, pid)
    assert machine.show(SOCKET, "InvocationID") == socket
    assert machine.show(SERVICE, "Result") == "success"
    assert answer(machine, "again\n") == "AGAIN"


def test_live_connections_survive_a_restart(machine: Container) -> None:
    with Conversation(machine) as conversation:
        for line in ("one", "two", "three"):
            assert conversation.ask(line) == line.upper()
            machine.run("systemctl", "restart", SERVICE)
        assert conversation.ask("four") == "FOUR"
        assert conversation.end() == ""


def test_ping_loses_nothing_by_a_restart(machine: Container) -> None:
    command = ["tcpupper", "--ping", "--connections", "20", "-i", "0.1"]
    with machine.popen(*command, stdout=subprocess.PIPE) as ping, ExitStack() as stack:
        stack.callback(ping.kill)
        for _ in range(3):
            read_on(ping)
            machine.run("systemctl", "restart", SERVICE)
        read_on(ping)
        machine.run("pkill", "--full", " --ping ")
        output, _ = ping.communicate(timeout=DEADLINE)
        assert ping.returncode == 0
    assert re.search(
        r"^([0-9]+) sent, \1 answered, 0 lost \(0 %\), 0 wrong, 0 disconnected,", output, re.M
    )


def read_on(ping: subprocess.Popen[str]) -> None:
    """Read until the last of the connections has an answer."""
    assert ping.stdout
    assert any(line.startswith("connection=20 ") for line in ping.stdout)


def test_stop_is_a_success(machine: Container) -> None:
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        machine.run("systemctl", "stop", SOCKET, SERVICE)
        assert conversation.end() == ""
    assert machine.show(SERVICE, "ActiveState") == "inactive"
    assert machine.show(SERVICE, "Result") == "success"
    assert machine.show(SERVICE, "ExecMainStatus") == "0"
    assert machine.show(SERVICE, "NRestarts") == "0"
    assert machine.try_run("tcpupper", "hello").returncode != 0


def see_replaced(machine: Container, signal: str) -> None:
    """A worker is replaced after a signal, and the main process stays."""
    pid, before = main_pid(machine), workers(machine)
    victim = min(before)
    machine.run("kill", signal, str(victim))
    until(lambda: victim not in workers(machine) and len(workers(machine)) == len(before))
    assert answer(machine, "next\n") == "NEXT"
    assert main_pid(machine) == pid


def test_killed_worker_is_replaced(machine: Container) -> None:
    see_replaced(machine, "-KILL")


def test_killed_main_process_is_restarted(machine: Container) -> None:
    pid, orphans = main_pid(machine), workers(machine)
    machine.run("kill", "-KILL", str(pid))
    assert answer(machine, "anyone\n") == "ANYONE"
    until(lambda: machine.show(SERVICE, "NRestarts") == "1")
    until(lambda: is_active(machine))
    assert not workers(machine) & orphans


def test_stopped_worker_is_replaced(machine: Container) -> None:
    drop_in(machine, SERVICE, "[Service]\nWatchdogSec=1\n")
    machine.run("systemctl", "restart", SERVICE)
    see_replaced(machine, "-STOP")


def test_stopped_main_process_is_restarted_by_the_watchdog(machine: Container) -> None:
    assert machine.show(SERVICE, "WatchdogUSec") == "20s"  # too long to wait for
    drop_in(machine, SERVICE, "[Service]\nWatchdogSec=1\nTimeoutAbortSec=1\n")
    machine.run("systemctl", "restart", SERVICE)
    machine.run("kill", "-STOP", str(main_pid(machine)))
    until(lambda: machine.show(SERVICE, "NRestarts") == "1")
    until(lambda: is_active(machine))
    assert answer(machine, "awake\n") == "AWAKE"
    assert "watchdog" in machine.journal(f"--unit={SERVICE}").lower()


def test_start_with_an_invalid_configuration_is_retried_until_it_is_corrected(
    machine: Container,
) -> None:
    """Clients wait meanwhile, and the socket does not fail."""
    machine.run("systemctl", "stop", SERVICE)
    machine.write(CONFIGURATION, WRONG_CONFIGURATION)
    assert machine.try_run("systemctl", "start", SERVICE).returncode != 0
    assert machine.show(SERVICE, "ExecMainStatus") == "78"
    assert CONFIGURATION in machine.journal(f"--unit={SERVICE}", "--priority=err")
    with Conversation(machine) as conversation:
        until(lambda: int(machine.show(SERVICE, "NRestarts")) >= 3)
        assert is_active(machine, SOCKET)
        machine.write(CONFIGURATION, "")
        assert conversation.ask("corrected") == "CORRECTED"


def test_journal_tells_the_priorities(machine: Container) -> None:
    machine.run("systemctl", "restart", SERVICE)
    entries = [
        json.loads(line)
        for line in machine.journal("--output=json", f"_SYSTEMD_UNIT={SERVICE}").splitlines()
    ]
    assert entries
    assert {entry["PRIORITY"] for entry in entries} == {"6"}
    assert {entry["SYSLOG_IDENTIFIER"] for entry in entries} == {"tcpupperd"}
    assert not any(entry["MESSAGE"].startswith("<") for entry in entries)


def test_serves_while_the_journal_hangs(machine: Container) -> None:
    """What the journal does not take is dropped and counted."""
    machine.write(CONFIGURATION, 'log_level = "debug"\n')
    drop_in(machine, SERVICE, "[Service]\nLogRateLimitIntervalSec=0\n")
    machine.run("systemctl", "restart", SERVICE)
    journal = machine.show(JOURNAL, "MainPID")
    with Conversation(machine) as conversation:
        machine.run("kill", "-STOP", journal)
        for number in range(MORE_THAN_A_QUEUE):
            assert conversation.ask(f"line {number}") == f"LINE {number}"
        machine.run("kill", "-CONT", journal)

        def told() -> bool:
            conversation.ask("anything new?")
            dropped = f"MESSAGE_ID={Event.MESSAGES_DROPPED.message_id}"
            explained = machine.journal("--catalog", f"--unit={SERVICE}", dropped)
            return f" Subject: {Event.MESSAGES_DROPPED.title}\n" in explained

        until(told)


def test_serves_without_a_journal(machine: Container) -> None:
    sockets = ("systemd-journald.socket", "systemd-journald-dev-log.socket")
    machine.run("systemctl", "stop", *sockets, JOURNAL)
    machine.run("systemctl", "reload", SERVICE)
    assert answer(machine, "nobody listens\n") == "NOBODY LISTENS"
    machine.run("systemctl", "restart", SERVICE)
    assert answer(machine, "still nobody\n") == "STILL NOBODY"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_by_hand_brings_a_new_process(machine: Container, number: signal.Signals) -> None:
    """Restart=always: connections are answered immediately, not only once another one arrives."""
    pid = main_pid(machine)
    machine.run("kill", f"-{number.value}", str(pid))
    until(lambda: main_pid(machine) not in (0, pid))
    until(lambda: is_active(machine))
    assert machine.show(SERVICE, "ExecMainStatus") == "0"


#: A client that sends until nothing more is taken, and reads no answer.
STALLED = """
import socket, sys
client = socket.create_connection(("127.0.0.1", 9999))
client.settimeout(2)
try:
    while True:
        client.send(b"unread\\n" * 9000)
except TimeoutError:
    print("stalled", flush=True)
sys.stdin.read()
"""


def test_stop_has_the_time_of_drain_timeout_whatever_the_unit_allows(machine: Container) -> None:
    """The daemon asks systemd for it; only after it are unread answers cut off by a reset."""
    drop_in(machine, SERVICE, "[Service]\nTimeoutStopSec=2\n")
    machine.write(CONFIGURATION, "drain_timeout = 6\n")
    machine.run("systemctl", "restart", SERVICE)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with machine.popen("python3", "-c", STALLED, **pipes) as client:
        assert client.stdout
        assert client.stdout.readline() == "stalled\n"
        machine.run("systemctl", "stop", SERVICE)
        client.kill()
    assert machine.show(SERVICE, "Result") == "success"
    assert "timed out" not in machine.journal(f"--unit={SERVICE}")


def test_restart_of_the_socket_resets_its_queue_and_nothing_else(machine: Container) -> None:
    """What docs/operating.md says about a change of Backlog=."""
    machine.write(CONFIGURATION, "workers = 1\nmax_connections = 1\n")
    machine.run("systemctl", "restart", SERVICE)
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        waiting = machine.popen("tcpupper", "two", stderr=subprocess.PIPE)
        try:
            until(lambda: queued(machine) == 1)
            machine.run("systemctl", "restart", SOCKET)
            _, error = waiting.communicate(timeout=DEADLINE)
        finally:
            waiting.kill()
        assert "reset by peer" in error
        assert conversation.ask("three") == "THREE"


def queued(machine: Container) -> int:
    """Connections that wait in the accept queues of port 9999."""
    listening = machine.run("ss", "-Hltn", "sport = :9999").splitlines()
    return sum(int(line.split()[1]) for line in listening)
