"""An instance and its configuration file, in whatever order they come."""

from system.container import Container
from system.service import Conversation, answer, drop_in, is_active
from system.test_proxy_socket import introduced
from waiting import until

FILE = "/etc/tcpupperd/7777.toml"
SOCKET = "tcpupperd@7777.socket"
SERVICE = "tcpupperd@7777.service"
METRICS = "tcpupperd-metrics@7777.socket"
GET = """
import urllib.request
print(urllib.request.urlopen("http://127.0.0.98:7777/metrics", timeout=30).read().decode())
"""
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
    with Conversation(machine, "--port=7777") as conversation:  # it waits for the service
        until(lambda: int(machine.show(SERVICE, "NRestarts")) >= 2)
        assert "create it" in machine.journal(f"--unit={SERVICE}", "--priority=err")
        machine.run("touch", FILE)
        assert conversation.ask("again") == "AGAIN"
    assert answer(machine, "the first one\n") == "THE FIRST ONE"

    sockets = [f"tcpupperd-{name}@7777.socket" for name in ("metrics", "proxy")]
    machine.run("systemctl", "enable", *sockets)
    machine.run("systemctl", "restart", SERVICE)
    assert "tcpupperd_workers " in machine.run("python3", "-c", GET)
    assert introduced(machine, "--host=127.0.0.97", "--port=7777") == "HELLO"
    use_other_port_for_metrics(machine)
    machine.run("systemctl", "stop", SOCKET)
    until(lambda: not any(is_active(machine, one) for one in sockets))


def use_other_port_for_metrics(machine: Container) -> None:
    """With the same command as for the main socket. (systemd 257 restarts this one with the
    service, too.)"""
    other = "[Socket]\nListenStream=\nListenStream=127.0.0.98:7778\n"
    drop_in(machine, METRICS, other)
    machine.run("systemctl", "restart", SERVICE)
    machine.run("systemctl", "restart", SOCKET, SERVICE)
    assert "tcpupperd_workers " in machine.run("python3", "-c", GET.replace("7777", "7778"))
