"""An instance and its configuration file, in whatever order they come."""

from system.container import Container
from system.service import Conversation, answer
from waiting import until

FILE = "/etc/tcpupperd/7777.toml"
SOCKET = "tcpupperd@7777.socket"
SERVICE = "tcpupperd@7777.service"
ENABLE = ("systemctl", "enable", "--now", SOCKET)


def test_instance_and_its_file(machine: Container) -> None:
    assert machine.try_run(*ENABLE).returncode != 0
    assert FILE in machine.try_run("systemctl", "status", SOCKET).stdout
    machine.run("touch", FILE)
    machine.run(*ENABLE)
    assert machine.run("tcpupper", "--port=7777", "hello") == "HELLO"

    with Conversation(machine, "--port=7777") as conversation:
        assert conversation.ask("one") == "ONE"
        machine.run("rm", FILE)
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.ask("two") == "TWO"

    machine.run("systemctl", "stop", SERVICE)
    assert machine.try_run("tcpupper", "--port=7777", "hello").returncode != 0
    # systemd keeps trying for the client until the socket's limit is reached.
    until(lambda: machine.show(SOCKET, "ActiveState") == "failed")
    assert "create it" in machine.journal(f"--unit={SERVICE}", "--priority=err")
    machine.run("touch", FILE)
    # systemd 257 and later remember that the socket's limit was hit for the whole interval.
    until(lambda: answers_after_a_start(machine), timeout=90)
    assert answer(machine, "the first one\n") == "THE FIRST ONE"


def answers_after_a_start(machine: Container) -> bool:
    machine.try_run("systemctl", "start", SOCKET)
    return machine.try_run("tcpupper", "--port=7777", "again").stdout == "AGAIN\n"
