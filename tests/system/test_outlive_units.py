"""A daemon that uses `outlive` from its Debian package: what its unit changes."""

import os
from subprocess import PIPE

import pytest

from system.container import Container
from system.roots import TREE
from system.service import Conversation, drop_in
from waiting import until

UNIT = "numbering.service"
SOURCE = TREE / "tests/integration/numbering.py"
PROGRAM = "/usr/local/lib/numbering.py"
#: With a user that no other test has: the kernel limits the descriptors in flight by user ID.
SERVICE = f"""[Unit]
StartLimitIntervalSec=0
[Service]
Type=notify
ExecStart=/usr/bin/python3 -I {PROGRAM} ""
ExecReload=/bin/kill -HUP $MAINPID
RestartKillSignal=SIGUSR2
SuccessExitStatus=SIGUSR2
FileDescriptorStoreMax=8
Restart=always
RestartSec=1
DynamicUser=yes
User=numbering-{os.getpid()}
PrivateNetwork=yes
WatchdogSec=10
"""
SOCKET = "[Socket]\nListenStream=127.0.0.1:7011\nFileDescriptorName=numbers\n"

#: A client that says what it is told to, and prints the answers; "" at the end.
ONE = """
import socket, sys
one = socket.create_connection(("127.0.0.1", 7011), 60)
answers = one.makefile()
for line in sys.stdin:
    one.sendall(line.encode())
    print(answers.readline().rstrip())
"""

#: Many clients that all say something, and something else when told to.
MANY = """
import socket, sys
clients = [socket.create_connection(("127.0.0.1", 7011), 60) for _ in range(60)]
for line in (b"first\\n", b"second\\n"):
    for one in clients:
        one.sendall(line)
    print({one.recv(100) for one in clients}, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def numbering(machine: Container) -> Container:
    """A machine on which the daemon is started by its first client."""
    machine.write(PROGRAM, SOURCE.read_text())
    machine.write(f"/etc/systemd/system/{UNIT}", SERVICE)
    machine.write("/etc/systemd/system/numbering.socket", SOCKET)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "numbering.socket")
    return machine


class OneClient(Conversation):
    """A client that stays connected. (tcpupper would find that it is answered too much.)"""

    def __init__(self, machine: Container) -> None:
        self.client = machine.popen("python3", "-uc", ONE, stdin=PIPE, stdout=PIPE)


def client(machine: Container) -> Conversation:
    return OneClient(machine)


def test_restarts_keep_connections_and_names_of_listeners(numbering: Container) -> None:
    with client(numbering) as one:
        assert one.ask("first") == "1 first"
        for number in range(2, 7):
            numbering.run("systemctl", "restart", UNIT)
            assert one.ask("listener") == f"{number} numbers"
    assert numbering.show(UNIT, "Result") == "success"
    assert numbering.show(UNIT, "NRestarts") == "0"


def test_memory_and_connections_left_outlive_a_kill(numbering: Container) -> None:
    with client(numbering) as one:
        assert one.ask("first") == "1 first"
        numbering.run("systemctl", "reload", UNIT)  # it remembers this
        numbering.run("systemctl", "kill", "--kill-whom=main", "--signal=USR2", UNIT)
        assert one.ask("second") == "2 second"
    assert "remembered: b'reloaded'" in numbering.journal(f"--unit={UNIT}")


def restart_that_loses(numbering: Container, setting: str) -> None:
    """With this setting, a restart ends connections."""
    drop_in(numbering, UNIT, f"[Service]\n{setting}\n")
    with client(numbering) as one:
        assert one.ask("first") == "1 first"
        numbering.run("systemctl", "restart", UNIT)
        assert one.ask("lost") == ""


def test_missing_signal_is_noticed(numbering: Container) -> None:
    restart_that_loses(numbering, "RestartKillSignal=SIGTERM")
    until(lambda: "set RestartKillSignal=SIGUSR2" in numbering.show(UNIT, "StatusText"))


def test_stop_is_not_mistaken_for_a_restart(numbering: Container) -> None:
    with client(numbering) as one:
        assert one.ask("first") == "1 first"
        numbering.run("systemctl", "stop", UNIT)
        assert one.ask("lost") == ""
    with client(numbering) as one:
        assert one.ask("next") == "1 next"
    assert "RestartKillSignal" not in numbering.journal(f"--unit={UNIT}")


def test_missing_store_is_a_clean_end(numbering: Container) -> None:
    restart_that_loses(numbering, "FileDescriptorStoreMax=0")


def test_lower_limit_is_told(numbering: Container) -> None:
    """The connections wait until the limit is raised again."""
    with numbering.popen("python3", "-c", MANY, stdin=PIPE, stdout=PIPE) as clients:
        assert clients.stdin
        assert clients.stdout
        assert clients.stdout.readline() == "{b'1 first\\n'}\n"
        drop_in(numbering, UNIT, "[Service]\nLimitNOFILE=80\n")
        numbering.run("systemctl", "restart", UNIT)
        until(lambda: "raise LimitNOFILE=" in numbering.show(UNIT, "StatusText"))
        drop_in(numbering, UNIT, "[Service]\nLimitNOFILE=4096\n")
        numbering.run("systemctl", "restart", UNIT)
        clients.stdin.close()
        assert clients.stdout.readline() == "{b'2 second\\n'}\n"


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_notify_reload(numbering: Container) -> None:
    """Of systemd 253: "systemctl reload" sends the signal itself, and waits for READY=1."""
    drop_in(numbering, UNIT, "[Service]\nType=notify-reload\nExecReload=\n")
    with client(numbering) as one:
        assert one.ask("first") == "1 first"
        numbering.run("systemctl", "reload", UNIT)
        assert numbering.show(UNIT, "ActiveState") == "active"
        numbering.run("systemctl", "restart", UNIT)
        assert one.ask("second") == "2 second"
    assert "remembered: b'reloaded'" in numbering.journal(f"--unit={UNIT}")
