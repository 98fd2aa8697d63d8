"""Changes of the socket unit, which has the addresses: no connection is lost, whatever comes next.

One machine for each story: each step begins where the one before has ended.
"""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from system.container import Container
from system.service import (
    CONFIGURATION,
    SERVICE,
    SOCKET,
    Conversation,
    drop_in,
    is_active,
    main_pid,
)
from tcpupperd.events import Event
from waiting import until

BOTH = ("systemctl", "restart", SOCKET, SERVICE)
REMEDY = f"{SOCKET} was changed: systemctl restart {SOCKET} {SERVICE}"
NOTHING = f"{SOCKET} was changed or has failed: systemctl restart {SOCKET} {SERVICE}"

#: Has an address until the end of its input.
LISTEN = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))):
    print("listening", flush=True)
    sys.stdin.read()
"""


def test_changed_addresses_end_no_connection(machine: Container) -> None:
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        listen_on(machine, 7777)
        for order in (restart, kill, reinstall, reexec, restart):
            order(machine)
            assert answers(machine, 9999)
            assert not answers(machine, 7777)
            assert conversation.ask("old address") == "OLD ADDRESS"
            until(lambda: REMEDY in machine.show(SERVICE, "StatusText"))
        assert f" Subject: {Event.SOCKET_CHANGED.title}\n" in machine.journal(
            "--catalog", f"MESSAGE_ID={Event.SOCKET_CHANGED.message_id}"
        )
        machine.run("systemctl", "restart", SOCKET)
        assert answers(machine, 7777)
        assert not answers(machine, 9999)
        assert conversation.ask("new address") == "NEW ADDRESS"
        assert "systemctl restart" not in machine.show(SERVICE, "StatusText")

        listen_on(machine, 7777, 7778)  # only added: nothing can tell
        machine.run("systemctl", "restart", SERVICE)
        assert not answers(machine, 7778)
        machine.run("systemctl", "restart", SOCKET)
        assert answers(machine, 7777)
        assert answers(machine, 7778)

        for _ in range(7):  # the default limit of systemd is 5 in 10 s
            machine.run("systemctl", "restart", SOCKET)
        assert conversation.ask("seven times") == "SEVEN TIMES"
        machine.run("systemctl", "stop", SOCKET)
        assert conversation.end() == ""
    until(lambda: not is_active(machine))
    assert "LISTEN" not in machine.run("ss", "-tln")
    assert machine.show(SERVICE, "NFileDescriptorStore") == "0"


def test_address_of_another_program(machine: Container) -> None:
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        with taken(machine, 7777):
            listen_on(machine, 7777)
            assert machine.try_run("systemctl", "restart", SOCKET).returncode != 0
            until(lambda: NOTHING in machine.show(SERVICE, "StatusText"))
            assert machine.show(SOCKET, "ActiveState") == "failed"
            assert conversation.ask("two") == "TWO"
            machine.run("systemctl", "restart", SERVICE)
            assert conversation.ask("three") == "THREE"
        machine.run("systemctl", "restart", SOCKET)
        assert answers(machine, 7777)
        assert conversation.ask("four") == "FOUR"
    machine.run("systemctl", "stop", SERVICE)
    listen_on(machine, 9999)
    # Nobody has lost anything, and nobody can connect: it says why, and begins when it can.
    assert machine.try_run("systemctl", "start", SERVICE).returncode != 0
    assert machine.show(SERVICE, "ExecMainStatus") == "71"
    assert NOTHING in machine.journal(f"--unit={SERVICE}", "--priority=err")
    machine.run("systemctl", "restart", SOCKET)
    assert answers(machine, 9999)


def test_one_command_mends_every_state(machine: Container) -> None:
    for spoil in (
        stop_service,
        stop_socket,
        stop_both,
        invalid_file,
        missing_module,
        missing_program,
        kill_all,
        trigger_limit,
    ):
        correct = spoil(machine)
        machine.run(*correct)
        if machine.try_run(*BOTH).returncode != 0:
            # The service was waiting to be started again, and could not remove its spare
            # listeners. It serves them, and says to run the command again.
            assert spoil in (missing_module, missing_program, kill_all)
            until(lambda: REMEDY in machine.show(SERVICE, "StatusText"))
            assert answers(machine, 9999)
            machine.run(*BOTH)
        assert machine.show(SOCKET, "Result") == "success"
        assert is_active(machine), spoil
        assert is_active(machine, SOCKET), spoil
        assert answers(machine, 9999), spoil


def stop_service(machine: Container) -> tuple[str, ...]:
    machine.run("systemctl", "stop", SERVICE)
    return ("true",)


def stop_socket(machine: Container) -> tuple[str, ...]:
    machine.run("systemctl", "stop", SOCKET)
    return ("true",)


def stop_both(machine: Container) -> tuple[str, ...]:
    machine.run("systemctl", "stop", SERVICE, SOCKET)
    return ("true",)


def invalid_file(machine: Container) -> tuple[str, ...]:
    machine.run("systemctl", "stop", SERVICE)
    machine.write(CONFIGURATION, "next = 1\n")
    assert machine.try_run(*BOTH).returncode != 0
    return ("truncate", "--size=0", CONFIGURATION)


def missing_module(machine: Container) -> tuple[str, ...]:
    return missing(machine, "/usr/lib/tcpupperd/tcpupperd/cli.py")


def missing_program(machine: Container) -> tuple[str, ...]:
    return missing(machine, "/usr/sbin/tcpupperd")


def missing(machine: Container, path: str) -> tuple[str, ...]:
    machine.run("mv", path, f"{path}.away")
    assert machine.try_run(*BOTH).returncode != 0
    return ("mv", f"{path}.away", path)


def kill_all(machine: Container) -> tuple[str, ...]:
    machine.run("systemctl", "kill", "--signal=KILL", SERVICE)
    return ("true",)


def trigger_limit(machine: Container) -> tuple[str, ...]:
    """A client starts the service again and again, which never runs."""
    machine.run("systemctl", "stop", SERVICE)
    drop_in(machine, SERVICE, "[Unit]\nConditionPathExists=/nonexistent\n")
    machine.try_run("tcpupper", "hello")
    until(lambda: machine.show(SOCKET, "Result") == "trigger-limit-hit")
    machine.run("rm", f"/etc/systemd/system/{SERVICE}.d/test.conf")
    return ("systemctl", "daemon-reload")


def test_clients_cannot_make_the_socket_fail(machine: Container) -> None:
    """Each starts the stopped service. systemd's limit was 10 in 30 s."""
    for _ in range(12):
        machine.run("systemctl", "stop", SERVICE)
        assert answers(machine, 9999)
    assert is_active(machine, SOCKET)


def test_frozen_service_outlives_the_watchdog_if_that_is_switched_off(machine: Container) -> None:
    drop_in(machine, SERVICE, "[Service]\nWatchdogSec=1\nTimeoutAbortSec=1\n")
    restart(machine)
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        machine.run("systemctl", "service-watchdogs", "no")
        freeze(machine, on=True)
        until(lambda: "Ignoring watchdog timeout" in machine.journal(f"--unit={SERVICE}"))
        freeze(machine, on=False)
        assert conversation.ask("two") == "TWO"
        machine.run("systemctl", "service-watchdogs", "yes")
        freeze(machine, on=True)
        until(lambda: machine.show(SERVICE, "NRestarts") == "1")
        assert conversation.end() == ""


def freeze(machine: Container, *, on: bool) -> None:
    """Another program than systemd does it."""
    group = machine.show(SERVICE, "ControlGroup")
    machine.write(f"/sys/fs/cgroup{group}/cgroup.freeze", str(int(on)))


def listen_on(machine: Container, *ports: int) -> None:
    """What "systemctl edit" does."""
    addresses = "".join(f"ListenStream=127.0.0.1:{port}\n" for port in ports)
    drop_in(machine, SOCKET, f"[Socket]\nListenStream=\n{addresses}")


def answers(machine: Container, port: int) -> bool:
    command = ("tcpupper", "--host=127.0.0.1", f"--port={port}", "hello")
    return machine.try_run(*command).stdout == "HELLO\n"


@contextmanager
def taken(machine: Container, port: int) -> Iterator[None]:
    """Another program has a port."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with machine.popen("python3", "-c", LISTEN, str(port), **pipes) as other:
        assert other.stdout
        other.stdout.readline()
        try:
            yield
        finally:
            other.communicate()


def restart(machine: Container) -> None:
    machine.run("systemctl", "restart", SERVICE)


def kill(machine: Container) -> None:
    before = main_pid(machine)
    machine.run("kill", f"-{signal.SIGKILL.value}", str(before))
    until(lambda: main_pid(machine) not in (0, before))
    until(lambda: is_active(machine))


def reinstall(machine: Container) -> None:
    package = machine.run("sh", "-c", "echo /mnt/tcpupperd_*.deb")
    said = machine.run("apt-get", "install", "--yes", "--reinstall", package)
    assert REMEDY in said


def reexec(machine: Container) -> None:
    machine.run("systemctl", "daemon-reexec")
    restart(machine)
