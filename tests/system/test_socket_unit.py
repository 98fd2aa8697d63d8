"""Changes of the socket unit, which has the addresses: no connection is lost, whatever comes next.

One machine for each story: each step begins where the one before has ended.
"""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from system.container import Container
from system.service import (
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
