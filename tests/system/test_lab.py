"""The packaged socket of the lab, and the recipes of docs/lab.md with each release's HAProxy and
nginx."""

from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from documents import ROOT, WITH_BALANCERS, check, script, steps
from system.conftest import install
from system.container import Container, booted
from system.roots import Root
from system.service import SERVICE, SOCKET, Conversation
from system.test_documents import PLACE
from waiting import until

LAB = "tcpupperd-lab.socket"
INSTANCE = "tcpupperd-lab@7777.socket"


@pytest.fixture
def machine(release: str, package: Path) -> Iterator[Container]:
    """A machine with load balancers and the package installed."""
    with booted(Root(release, "balancers"), package.parent) as machine:
        install(machine, package)
        yield machine


def test_recipes(machine: Container) -> None:
    session = [*PLACE, *steps((ROOT / WITH_BALANCERS).read_text())]
    # They wait for many timeouts, one after the other.
    bash = machine.popen("bash", stdin=PIPE, stdout=PIPE, stderr=STDOUT)
    printed, _ = bash.communicate(script(session), timeout=600)
    print(printed)
    check(session, printed.rstrip("\n"))
    assert machine.show(LAB, "ActiveState") == "inactive"
    assert machine.run("tcpupper", "hello") == "HELLO"


def test_socket_can_be_added_while_clients_are_connected(machine: Container) -> None:
    assert machine.try_run("systemctl", "is-enabled", LAB).stdout == "disabled\n"
    assert machine.try_run("tcpupper", "--lab", "who").returncode
    with Conversation(machine) as conversation:
        assert conversation.ask("before") == "BEFORE"
        machine.run("systemctl", "enable", LAB)
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.ask("after") == "AFTER"
    assert '"service": "lab"' in machine.run("tcpupper", "--lab", "who")
    waiting = machine.popen("tcpupper", "--lab", "wait", "4", "hello", stdout=PIPE)
    machine.run("systemctl", "restart", SERVICE)
    machine.run("systemctl", "reload", SERVICE)
    assert waiting.communicate()[0] == '{"text": "hello"}\n'
    machine.run("systemctl", "stop", SOCKET, SERVICE)
    until(lambda: "LISTEN" not in machine.run("ss", "-tln"))


def test_instance_has_a_lab_of_its_own(machine: Container) -> None:
    machine.write("/etc/tcpupperd/7777.toml", "")
    machine.run("systemctl", "start", "tcpupperd@7777.socket", "tcpupperd@7777.service")
    machine.run("systemctl", "enable", INSTANCE)
    machine.run("systemctl", "restart", "tcpupperd@7777.service")
    told = machine.run("tcpupper", "--lab", "--host=127.0.0.92", "--port=7777", "who")
    assert '"instance": "7777"' in told
