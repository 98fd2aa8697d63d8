"""Three servers behind a load balancer, whose clients notice nothing of restarts and stops.

The balancers are each release's HAProxy, nginx and systemd-socket-proxyd, with the configurations
in examples/. Clients are at work all the time, see tests/load/exchanges.py.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest

from haproxy import HAProxy
from load import exchanges
from load.exchanges import CLIENTS, Exchanges, Report
from system.conftest import install
from system.container import Container, booted, children_of
from system.network import BALANCER, SERVERS, Network
from system.roots import TREE, Root
from tools import need
from waiting import until

EXAMPLES = TREE / "examples"
#: Where the package installs them.
INSTALLED = "/usr/share/doc/tcpupperd/examples"
UNITS = "/etc/systemd/system"
#: The instance of the service that each server is.
INSTANCES = {name: str(number) for number, name in enumerate(SERVERS, 7771)}

#: The port of sticky.cfg.
STICKY = "9995"


@pytest.fixture(scope="module")
def network(release: str, package: Path) -> Iterator[Network]:
    """The network, with each server in its namespace."""
    need("nft")
    with booted(Root(release, "balancers"), package.parent) as machine:
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
            metrics = f"{there}ListenStream=\nListenStream={address}:9998\n"
            machine.write(f"{UNITS}/{metrics_of(name)}.d/test.conf", metrics)
            configure(machine, name, "")
        # Less than shutdown_delay: the service asks for more.
        machine.write(f"{UNITS}/{service_of('one')}.d/test.conf", "[Service]\nTimeoutStopSec=1\n")
        machine.run("systemctl", "daemon-reload")
        for name in SERVERS:
            machine.run("systemctl", "enable", agent_of(name), metrics_of(name))
            start(machine, name)
        yield network


@pytest.fixture
def haproxy(network: Network) -> Iterator[HAProxy]:
    files = (f"{INSTALLED}/haproxy/{name}.cfg" for name in ("haproxy", "sticky"))
    network.machine.run("mkdir", "--parents", "/run/haproxy")
    with network.balancing("haproxy", *(word for file in files for word in ("-f", file))):
        haproxy = HAProxy(Path(f"/proc/{network.machine.leader}/root/run/haproxy/admin.sock"))
        until(haproxy.sees_all)
        yield haproxy


@contextmanager
def nginx(network: Network, file: str) -> Iterator[subprocess.Popen[str]]:
    """nginx, once it has started its workers."""
    options = ("-c", file, "-e", "stderr", "-g", "daemon off;")
    with network.balancing("nginx", *options) as process:
        until(lambda: children_of(process.pid))
        yield process


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
    set_delay(network, 2)
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
    assert no_line_was_lost(report)


def test_rolling_stops_of_servers_that_say_whether_they_are_ready(
    network: Network, haproxy: HAProxy
) -> None:
    """Without the agent, and although clients stick to a server."""

    def is_up(name: str) -> bool:
        return haproxy.check("tcpupperd-sticky", name) == "L7OK"

    set_delay(network, 4)
    until(lambda: all(map(is_up, SERVERS)))
    with at_work(network, STICKY) as clients:
        for name in SERVERS:
            stop(network.machine, name)
            clients.go_on()
            start(network.machine, name)
            until(partial(is_up, name))
            clients.go_on()
        assert no_line_was_lost(clients.finish())


def test_stops_of_services_whose_sockets_stay(network: Network, haproxy: HAProxy) -> None:
    """The balancer need not be told about them: a client that connects waits and starts the
    service again."""
    set_delay(network, 0)
    with at_work(network) as clients:
        for name in SERVERS:
            network.machine.try_run("systemctl", "stop", service_of(name))  # may be cancelled
            network.machine.run("systemctl", "start", service_of(name))
            clients.go_on()
        assert no_line_was_lost(clients.finish())
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


def test_rolling_restarts_behind_nginx(network: Network) -> None:
    with nginx(network, f"{INSTALLED}/nginx/nginx.conf"), at_work(network) as clients:
        for name in SERVERS:
            restart(network.machine, name)
            clients.go_on()
        assert is_undisturbed(clients.finish())


def test_rolling_stops_of_servers_marked_down_in_nginx(network: Network) -> None:
    """nginx has no active checks: an administrator marks each server down before it stops."""
    text, file = (EXAMPLES / "nginx/nginx.conf").read_text(), "/root/nginx.conf"

    def mark_down(name: str = "") -> None:
        """Mark one server down, and the others up."""
        server = f"server {SERVERS.get(name)}:9999"
        network.machine.write(file, text.replace(server, f"{server} down"))

    mark_down()
    set_delay(network, 4)
    with nginx(network, file) as process, at_work(network) as clients:
        for name in SERVERS:
            mark_down(name)
            reload_nginx(process)
            stop(network.machine, name)
            clients.go_on()
            start(network.machine, name)
            mark_down()
            reload_nginx(process)
            clients.go_on()
        assert no_line_was_lost(clients.finish())


def reload_nginx(process: subprocess.Popen[str]) -> None:
    """Reload the configuration, and wait until it is used."""
    before = set(children_of(process.pid))
    process.send_signal(signal.SIGHUP)
    until(lambda: set(children_of(process.pid)) - before)


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


def metrics_of(server: str) -> str:
    return f"tcpupperd-metrics@{INSTANCES[server]}.socket"


def set_delay(network: Network, seconds: int) -> None:
    """Set shutdown_delay on all servers."""
    for name in SERVERS:
        configure(network.machine, name, f"shutdown_delay = {seconds}\n")
        network.machine.run("systemctl", "reload", service_of(name))


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
def at_work(network: Network, port: str = "9999") -> Iterator[Exchanges]:
    """Clients at work in their namespace."""
    words = (sys.executable, exchanges.__file__, BALANCER, port)
    with network.running("client", *words, stdin=PIPE, stdout=PIPE) as process:
        clients = Exchanges(process)
        clients.go_on()
        yield clients


def is_undisturbed(report: Report) -> bool:
    """Whether no client has seen an error or the end of a connection."""
    print(report)
    return report.ended == 0 and report.faults == {}


def no_line_was_lost(report: Report) -> bool:
    """Whether clients have seen nothing but the end of a connection when its server stopped."""
    print(report)
    return report.faults == {} and report.ended <= len(SERVERS) * CLIENTS
