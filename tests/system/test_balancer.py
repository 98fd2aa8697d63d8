"""Three servers behind a load balancer, whose clients notice nothing of restarts and stops.

The balancers are Debian's HAProxy, nginx and systemd-socket-proxyd, as in examples/. Clients are
at work all the time, see tests/load/exchanges.py.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from haproxy import HAProxy
from load import exchanges
from load.exchanges import CLIENTS, Exchanges, Report
from system.conftest import install
from system.container import Container, booted
from system.network import BALANCER, SERVERS, Network
from system.roots import TREE, Root
from tools import need
from waiting import until

EXAMPLES = TREE / "examples"
UNITS = "/etc/systemd/system"
#: The instance of the service that each server is.
INSTANCES = {name: str(number) for number, name in enumerate(SERVERS, 7771)}

pytestmark = pytest.mark.parametrize("release", ["trixie"], indirect=True)


@pytest.fixture(scope="module")
def network(release: str, package: Path) -> Iterator[Network]:
    """The network, with each server in its namespace."""
    for tool in ("haproxy", "nginx", "nft"):
        need(tool)
    with booted(Root(release, "booted"), package.parent) as machine:
        install(machine, package)
        network = Network(machine)
        agent = (EXAMPLES / "haproxy/tcpupperd-agent.socket").read_text()
        agent = agent.replace("tcpupperd.", "tcpupperd@%i.")
        machine.write(f"{UNITS}/tcpupperd-agent@.socket", agent)
        for name, address in SERVERS.items():
            there = f"[Socket]\nNetworkNamespacePath=/run/netns/{name}\n"
            here = f"{there}ListenStream=\nListenStream={address}:9999\n"
            machine.write(f"{UNITS}/{socket_of(name)}.d/test.conf", here)
            machine.write(f"{UNITS}/{agent_of(name)}.d/test.conf", there)
            configure(machine, name, "shutdown_delay = 2")
        # Less than shutdown_delay: the service asks for more.
        machine.write(f"{UNITS}/{service_of('one')}.d/test.conf", "[Service]\nTimeoutStopSec=1\n")
        machine.run("systemctl", "daemon-reload")
        for name in SERVERS:
            machine.run("systemctl", "enable", agent_of(name))
            start(machine, name)
        yield network


@pytest.fixture
def haproxy(network: Network, tmp_path: Path) -> Iterator[HAProxy]:
    text = (EXAMPLES / "haproxy/haproxy.cfg").read_text()
    file = tmp_path / "haproxy.cfg"
    file.write_text(text.replace("/run/haproxy", str(tmp_path)))
    tmp_path.chmod(0o755)
    with network.running("balancer", "haproxy", "-f", str(file)):
        haproxy = HAProxy(tmp_path / "admin.sock")
        until(haproxy.sees_all)
        yield haproxy


# HAProxy


def test_rolling_restarts(network: Network, haproxy: HAProxy) -> None:
    with at_work(network) as clients:
        for name in SERVERS:
            restart(network.machine, name)
            clients.go_on()
        assert is_undisturbed(clients.finish())
    until(haproxy.sees_all)


def test_restarts_on_a_bad_network(network: Network, haproxy: HAProxy) -> None:
    """Packets of 256 bytes, of which one in fifty is lost, and a link that is down meanwhile."""
    for name in SERVERS:
        network.set_mtu(name, 256)
    with network.losing("balancer", percent=2), at_work(network) as clients:
        for name in SERVERS:
            network.link(name, "down")
            restart(network.machine, name)
            network.link(name, "up")
            clients.go_on()
        assert is_undisturbed(clients.finish())
    for name in SERVERS:
        network.set_mtu(name, 1500)


def test_rolling_stops_with_the_agent(network: Network, haproxy: HAProxy) -> None:
    with at_work(network) as clients:
        usual = clients.go_on()
        longest = 0.0
        for name in SERVERS:
            stop(network.machine, name)
            longest = max(longest, clients.go_on())
            start(network.machine, name)
            until(haproxy.sees_all)
        report = clients.finish()
    print(f"longest answer: usually {usual:.3f} s, during stops {longest:.3f} s")
    assert report.faults == {}
    assert report.ended <= len(SERVERS) * CLIENTS


def test_stops_of_services_whose_sockets_stay(network: Network, haproxy: HAProxy) -> None:
    """The balancer need not be told about them: a client that connects waits and starts the
    service again."""
    for name in SERVERS:
        configure(network.machine, name, "shutdown_delay = 0")
        network.machine.run("systemctl", "reload", service_of(name))
    with at_work(network) as clients:
        for name in SERVERS:
            network.machine.try_run("systemctl", "stop", service_of(name))  # may be cancelled
            network.machine.run("systemctl", "start", service_of(name))
            clients.go_on()
        report = clients.finish()
    assert report.faults == {}
    assert report.ended <= len(SERVERS) * CLIENTS
    until(haproxy.sees_all)


def test_killed_server(network: Network, haproxy: HAProxy) -> None:
    """Only what is in flight on it is lost: the connections that it has, at most one of each
    client. Others wait in its socket, or go elsewhere."""
    with at_work(network) as clients:
        clients.go_on()
        had = haproxy.connections("two")
        network.machine.run("systemctl", "kill", "--signal=KILL", service_of("two"))
        until(lambda: network.machine.show(service_of("two"), "NRestarts") != "0")
        until(haproxy.sees_all)
        clients.go_on()
        report = clients.finish()
    print(f"killed with {had} connections: {report}")
    assert report.ended <= had
    assert sum(report.faults.values()) <= CLIENTS


def test_link_that_is_down(network: Network, haproxy: HAProxy) -> None:
    """Once the balancer has noticed, no client does."""
    network.link("three", "down")
    haproxy.wait_until_missed("three")
    with at_work(network) as clients:
        clients.go_on()
        network.link("three", "up")
        until(haproxy.sees_all)
        clients.go_on()
        assert is_undisturbed(clients.finish())


# Others


def test_rolling_restarts_behind_nginx(network: Network, tmp_path: Path) -> None:
    text = (EXAMPLES / "nginx/nginx.conf").read_text()
    file = tmp_path / "nginx.conf"
    file.write_text(text.replace("/run", str(tmp_path)).replace("/var/log/nginx", str(tmp_path)))
    words = ("nginx", "-c", str(file), "-e", "stderr", "-g", "daemon off;")
    with network.running("balancer", *words), at_work(network) as clients:
        for name in SERVERS:
            restart(network.machine, name)
            clients.go_on()
        assert is_undisturbed(clients.finish())


def test_restarts_behind_socket_proxyd(network: Network) -> None:
    machine = network.machine
    for unit, section in (("front.socket", "Socket"), ("front.service", "Service")):
        text = (EXAMPLES / f"socket-proxyd/tcpupperd-{unit}").read_text()
        machine.write(f"{UNITS}/tcpupperd-{unit}", text)
        there = f"[{section}]\nNetworkNamespacePath=/run/netns/balancer\n"
        machine.write(f"{UNITS}/tcpupperd-{unit}.d/test.conf", there)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "tcpupperd-front.socket")
    with at_work(network) as clients:
        for _ in range(3):
            restart(machine, "one")
            clients.go_on()
        assert is_undisturbed(clients.finish())
    machine.run("systemctl", "stop", "tcpupperd-front.socket", "tcpupperd-front.service")


# What an administrator does


def service_of(server: str) -> str:
    return f"tcpupperd@{INSTANCES[server]}.service"


def socket_of(server: str) -> str:
    return f"tcpupperd@{INSTANCES[server]}.socket"


def agent_of(server: str) -> str:
    return f"tcpupperd-agent@{INSTANCES[server]}.socket"


def configure(machine: Container, server: str, settings: str) -> None:
    machine.write(f"/etc/tcpupperd/{INSTANCES[server]}.toml", settings)


def start(machine: Container, server: str) -> None:
    machine.run("systemctl", "start", socket_of(server), service_of(server))


def stop(machine: Container, server: str) -> None:
    machine.run("systemctl", "stop", socket_of(server), service_of(server))
    assert machine.show(service_of(server), "ActiveState") == "inactive"
    assert machine.show(service_of(server), "Result") == "success"


def restart(machine: Container, server: str) -> None:
    before = machine.show(service_of(server), "MainPID")
    machine.run("systemctl", "restart", service_of(server))
    assert machine.show(service_of(server), "MainPID") not in ("0", before)


# What is seen


@contextmanager
def at_work(network: Network) -> Iterator[Exchanges]:
    """Clients at work in their namespace."""
    words = (sys.executable, exchanges.__file__, BALANCER, "9999")
    with network.running("client", *words, stdin=PIPE, stdout=PIPE) as process:
        clients = Exchanges(process)
        clients.go_on()
        yield clients


def is_undisturbed(report: Report) -> bool:
    """Whether no client has seen an error or the end of a connection."""
    print(report)
    return report.ended == 0 and report.faults == {}
