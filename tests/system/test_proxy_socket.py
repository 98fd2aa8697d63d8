"""The packaged socket for load balancers."""

from system.container import Container
from system.service import SERVICE, SOCKET, Conversation, main_pid
from waiting import until

PROXY = "tcpupperd-proxy.socket"
HEADER = "PROXY TCP4 192.0.2.7 192.0.2.1 56324 443\r\n"


def test_socket_for_load_balancers_can_be_added_while_clients_are_connected(
    machine: Container,
) -> None:
    assert machine.try_run("systemctl", "is-enabled", PROXY).stdout == "disabled\n"
    assert machine.show(PROXY, "ActiveState") == "inactive"
    socket, pid = machine.show(SOCKET, "InvocationID"), main_pid(machine)
    with Conversation(machine) as conversation:
        assert conversation.ask("before") == "BEFORE"
        machine.run("systemctl", "enable", PROXY)
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.ask("after") == "AFTER"
    assert machine.show(PROXY, "ActiveState") == "active"
    assert machine.show(SOCKET, "InvocationID") == socket
    assert main_pid(machine) != pid

    assert introduced(machine) == "HELLO"
    assert machine.run("tcpupper", stdin=HEADER).rstrip() == HEADER.upper().rstrip()
    assert machine.try_run("tcpupper", "--port=9997", "hello").returncode != 0
    told = machine.journal(f"--unit={SERVICE}", "--priority=warning", "--output=cat")
    assert "PROXY header rejected: not a PROXY header: byte 1 is 0x68" in told

    machine.run("systemctl", "stop", SOCKET, SERVICE)
    until(lambda: "LISTEN" not in machine.run("ss", "-tln"))
    machine.run("systemctl", "start", SERVICE)
    assert introduced(machine) == "HELLO"

    machine.run("sh", "-c", "dpkg --install /mnt/*.deb")
    assert introduced(machine) == "HELLO"
    machine.run("apt-get", "remove", "--yes", "tcpupperd")
    assert "LISTEN" not in machine.run("ss", "-tln")


def introduced(machine: Container, *where: str) -> str:
    """The answer to a client that a header introduces. tcpupper takes the header for a line, and
    complains that it is not answered."""
    command = ("tcpupper", *(where or ("--port=9997",)))
    return machine.try_run(*command, stdin=HEADER + "hello\n").stdout.split()[0]
