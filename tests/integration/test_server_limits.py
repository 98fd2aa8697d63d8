"""Limits: of connections, of those of one source, and of descriptors."""

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.client import Client
from integration.embedding import (
    ANY_PORT,
    CountingServer,
    connected,
    endpoint_of,
    is_silent,
    serving,
)
from integration.measures import cpu_share
from integration.processes import cannot
from tcpupperd.address import source_of
from tcpupperd.config import Config
from tcpupperd.serving.counters import ACCEPTED, SOURCE_LIMIT
from tcpupperd.serving.server import UpperServer
from tools import need
from waiting import DEADLINE, until

ROOT = Path(__file__).parents[2]


def test_connection_over_the_limit_waits_until_another_ends() -> None:
    with (
        serving(CountingServer(ANY_PORT, config=Config(max_connections=2))) as server,
        connected(server) as first,
        connected(server) as second,
    ):
        assert first.ask(b"first") == b"FIRST"
        assert second.ask(b"second") == b"SECOND"
        with connected(server) as third:
            third.send(b"third\n")
            assert first.ask(b"still served") == b"STILL SERVED"
            server.comes_to_rest()
            assert is_silent(third)
            assert server.tally.numbers[ACCEPTED] == 2
            second.close()
            assert third.read_line() == b"THIRD\n"
            assert len(server.connections) == 2


def test_no_more_than_the_limit_of_one_source_are_served() -> None:
    config = Config(max_connections_per_source=2)
    with (
        serving(CountingServer(ANY_PORT, config=config)) as server,
        contextlib.ExitStack() as all_,
    ):
        clients = [all_.enter_context(connected(server)) for _ in range(2)]
        assert [client.ask(b"in") for client in clients] == [b"IN", b"IN"]
        with connected(server) as third:
            assert third.read_to_end() == b""
        assert server.tally.numbers[SOURCE_LIMIT] == 1
        address, source = endpoint_of(server), ("127.0.0.2", 0)
        with socket.create_connection(address, DEADLINE, source) as elsewhere:
            elsewhere.sendall(b"from elsewhere\n")
            assert elsewhere.recv(100) == b"FROM ELSEWHERE\n"
        clients[0].close()
        until(lambda: len(server.connections) == 1)
        with connected(server) as again:
            assert again.ask(b"in again") == b"IN AGAIN"


def test_source_without_connections_uses_no_memory() -> None:
    config = Config(max_connections_per_source=1)
    with serving(CountingServer(ANY_PORT, config=config)) as server:
        with connected(server) as client:
            assert client.ask(b"in") == b"IN"
            assert len(server.connections.sources) == 1
        until(lambda: len(server.connections.sources) == 0)


def test_one_ipv4_source_is_the_same_on_a_socket_for_both() -> None:
    config = Config(max_connections_per_source=1)
    with serving(CountingServer(("", 0), config=config)) as server:
        _, port = endpoint_of(server)
        with (
            socket.create_connection(("127.0.0.1", port), DEADLINE) as first,
            socket.create_connection(("127.0.0.1", port), DEADLINE) as second,
            socket.create_connection(("::1", port), DEADLINE) as third,
        ):
            assert second.recv(100) == b""
            for one in (first, third):
                one.sendall(b"in\n")
                assert one.recv(100) == b"IN\n"


def test_local_clients_have_no_source(tmp_path: Path) -> None:
    config = Config(max_connections_per_source=1)
    with (
        serving(UpperServer(str(tmp_path / "socket"), config=config)) as server,
        connected(server) as first,
        connected(server) as second,
    ):
        assert first.ask(b"first") == b"FIRST"
        assert second.ask(b"second") == b"SECOND"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("fe80::1%eth0", "fe80::1%eth1", False),
        ("::1", "::ffff:0.0.0.1", False),
    ],
)
def test_source_is_an_ipv4_address_or_an_ipv6_network(one: str, other: str, same: bool) -> None:
    assert (source_of((one, 1)) == source_of((other, 2, 0, 0))) is same


NETWORKS = """
import socket, threading
from tcpupperd.config import Config
from tcpupperd.host.sockets import Listener
from tcpupperd.serving.deadlines import Deadlines
from tcpupperd.serving.protocol import LineProtocol
from tcpupperd.serving.server import UpperServer

def answer(source):
    client = socket.create_connection(server.server_address[:2], 10, (source, 0))
    clients.append(client)
    client.sendall(b"in\\n")
    return client.recv(100)

clients = []
with UpperServer(("2001:db8::1", 0), config=Config(max_connections_per_source=1)) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        print(answer("2001:db8:0:1::1"), answer("2001:db8:0:2::1"))
        refused = socket.create_connection(server.server_address[:2], 10, ("2001:db8:0:1::2", 0))
        print(refused.recv(100))
    finally:
        server.shutdown()
        thread.join()
"""


def test_one_ipv6_source_is_a_network() -> None:
    addresses = ("2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:2::1")
    steps = [f"ip address add {address}/64 dev lo nodad" for address in addresses]
    set_up = " && ".join(["ip link set lo up", *steps])
    shell = ["unshare", "--map-root-user", "--net", "sh", "-c"]
    need("ip")
    if subprocess.run([*shell, set_up], check=False).returncode:
        cannot("no network namespace can be made")
    done = subprocess.run(
        [*shell, f'{set_up} && exec "$0" -c "$1"', sys.executable, NETWORKS],
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=DEADLINE,
    )
    assert done.stdout == "b'IN\\n' b'IN\\n'\nb''\n"


# Without descriptors

SHORT = """
import logging, resource, sys
from tcpupperd.serving.server import UpperServer

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
with UpperServer(("127.0.0.1", 0)) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""


@contextlib.contextmanager
def short_of_descriptors(log: Path) -> Iterator[tuple[int, str]]:
    """A process with a server that may have few descriptors: its number and address."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", SHORT], cwd=ROOT, stdout=file)
    try:
        until(lambda: "\n" in log.read_text())
        yield process.pid, f"127.0.0.1:{int(log.read_text())}"
    finally:
        process.kill()
        process.wait()


def test_connections_wait_while_there_are_no_descriptors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with short_of_descriptors(log) as (pid, address), contextlib.ExitStack() as stack:
        clients = [Client(address) for _ in range(40)]
        for number, client in enumerate(clients):
            stack.callback(client.close)
            client.send(b"client %d\n" % number)
        pattern = (
            "WARNING not accepting connections: Too many open files; ([0-9]+) connections? open"
        )
        served = int(until(lambda: re.search(pattern, log.read_text()))[1])
        assert 5 < served < 20
        for number, client in enumerate(clients[:served]):
            assert client.read_line() == b"CLIENT %d\n" % number
        until(lambda: cpu_share([pid], 0.5) < 0.2)
        assert all(map(is_silent, clients[served:]))
        # Each that ends makes room for one that waits.
        for number in range(served, len(clients)):
            clients[number - served].close()
            assert clients[number].read_line() == b"CLIENT %d\n" % number
        stack.close()
        with contextlib.closing(Client(address)) as client:
            assert client.ask(b"room again") == b"ROOM AGAIN"
            until(lambda: "WARNING accepting connections again\n" in log.read_text())
        assert log.read_text().count("WARNING") == 2
