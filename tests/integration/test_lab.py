"""A lab listener: what its clients see of each order, and what nobody else sees."""

import contextlib
import json
import re
import select
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from integration.client import Client
from integration.daemon import Daemon, Shared
from integration.embedding import (
    CountingServer,
    address_of,
    connected,
    is_silent,
    serving,
    small_listener,
)
from integration.service import Service
from outlive.channel import RECEIVE_END, SEND_END
from tcpupperd import Config
from tcpupperd.host.sockets import Listener
from tcpupperd.processes.connection_format import Connection, receive, send
from tcpupperd.serving.connection import HALF_CLOSED_TIME
from tcpupperd.serving.deadlines import Deadlines
from tcpupperd.serving.lab import ORDER_MAX, filling
from waiting import until

LISTEN = ["127.0.0.1:0", "lab=127.0.0.1:0", "lab-proxy=127.0.0.1:0"]

#: Orders that take their time, and all that is sent in answer.
LASTING = [
    ("wait 2 a text", b'{"text": "a text"}\n'),
    ("drip 40 2", filling(40, 40)),
    ("flood 50000000", filling(50000000, 50000000)),
    ("stall 2", b""),
]

FIELDS = (
    "host",
    "instance",
    "client",
    "port",
    "worker",
    "lines",
    "service",
    "duration_usec",
    "connection",
    "listener",
    "received",
    "sent",
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with Shared(listen=LISTEN, workers=1) as daemon:
        yield daemon


@pytest.fixture
def daemon(shared: Shared) -> Shared:
    shared.renew()
    return shared


def connect(daemon: Daemon, service: str = "lab") -> Client:
    return daemon.connect(daemon.address_of(service))


def ask(client: Client, order: bytes) -> Any:
    """The answer to an order."""
    return json.loads(client.ask(order))


def begun(daemon: Daemon, client: Client, order: str) -> None:
    """Send an order, and wait until the daemon has received it."""
    before = daemon.counters()["received_bytes"]
    client.send(f"{order}\n".encode())
    until(lambda: daemon.counters()["received_bytes"] > before)


# Who


def test_who_says_what_the_journal_would(daemon: Daemon) -> None:
    client = connect(daemon)
    ask(client, b"echo a")
    found = ask(client, b"who")
    assert tuple(found) == FIELDS
    assert found["client"] == "127.0.0.1"
    assert found["port"] == client.port
    assert f"lab={found['listener']}" in daemon.addresses
    assert found["worker"] == daemon.worker_of(client)
    assert (found["lines"], found["service"], found["instance"]) == (1, "lab", "tcpupperd")
    assert re.fullmatch("[0-9a-f]+", found["connection"])
    assert found["duration_usec"] >= 0


def test_connection_keeps_its_number_and_its_age_across_a_reload(daemon: Daemon) -> None:
    client = connect(daemon)
    before = ask(client, b"who")
    daemon.reload()
    until(lambda: daemon.counters()["handed_over_in"] == 1)
    after = ask(client, b"who")
    assert after["connection"] == before["connection"]
    assert after["worker"] != before["worker"]
    assert after["duration_usec"] > before["duration_usec"]
    assert after["lines"] == 1


def test_balancer_identifies_the_client(daemon: Daemon) -> None:
    client = connect(daemon, "lab-proxy")
    client.send(b"PROXY TCP4 192.0.2.7 192.0.2.1 56324 443\r\n")
    found = ask(client, b"who")
    assert (found["client"], found["port"], found["service"]) == ("192.0.2.7", 56324, "lab")
    assert (found["balancer"], found["destination"]) == ("127.0.0.1", "192.0.2.1:443")
    daemon.reload()
    assert ask(client, b"who")["balancer"] == "127.0.0.1"


def test_client_that_is_not_identified_yet_outlives_a_reload(daemon: Daemon) -> None:
    client = connect(daemon, "lab-proxy")
    client.send(b"PROXY TCP4 192.0.2.7 192")
    until(lambda: daemon.counters()["received_bytes"] == 24)
    daemon.reload()
    client.send(b".0.2.1 56324 443\r\nwho\n")
    assert json.loads(client.read_line())["client"] == "192.0.2.7"


def test_header_is_an_invalid_order_where_none_is_expected(daemon: Daemon) -> None:
    client = connect(daemon)
    found = ask(client, b"PROXY TCP4 192.0.2.7 192.0.2.1 56324 443\r")
    assert found["error"] == 'unknown order "PROXY"'
    assert ask(client, b"who")["client"] == "127.0.0.1"


def test_order_without_a_header_is_refused_where_one_is_expected(daemon: Daemon) -> None:
    client = connect(daemon, "lab-proxy")
    client.send(b"who\n")
    assert client.read_to_end() == b""
    assert "PROXY header rejected: not a PROXY header" in daemon.log


# Ends


def test_reset_is_a_reset(daemon: Daemon) -> None:
    client = connect(daemon)
    client.send(b"reset\n")
    with pytest.raises(ConnectionResetError):
        client.read_to_end()
    until(lambda: daemon.counters()["complete"] == 1)


def test_reset_follows_what_was_sent_before(daemon: Daemon) -> None:
    """Also if the client has closed its side."""
    client = connect(daemon)
    client.send(b"flood 100000\nstall 0.3\nreset\nwho\n")
    client.end()
    assert client.read(100000) == filling(100000, 100000)
    with pytest.raises(ConnectionResetError):
        client.read(1)


def test_close_is_orderly(daemon: Daemon) -> None:
    client = connect(daemon)
    client.send(b"echo a\nclose\nwho\n" + b"x" * 1000)
    assert client.read_to_end() == b'{"text": "a"}\n'
    client.send(b"x")  # which is no reason for a reset


def test_half_close_waits_for_the_client(daemon: Daemon) -> None:
    client = connect(daemon)
    client.send(b"half-close\nwho\n")
    assert client.read_to_end() == b""
    client.send(b"who\n")
    daemon.reload()
    until(lambda: daemon.counters()["handed_over_in"] == 1)
    client.send(b"who\n")
    until(lambda: daemon.counters()["received_bytes"] == 23)  # also what it drops
    assert daemon.counters()["open"] == 1
    client.end()
    until(lambda: daemon.counters()["open"] == 0)


def test_half_close_is_for_longer_than_a_close() -> None:
    with serving(lab_server()) as server, connected(server) as client:
        client.send(b"half-close\n")
        assert client.read_to_end() == b""
        [connection] = server.connections
        left = until(lambda: connection.lingers_until) - time.monotonic()
        assert HALF_CLOSED_TIME - 60 < left <= HALF_CLOSED_TIME


def test_last_order_needs_no_newline(daemon: Daemon) -> None:
    client = connect(daemon)
    client.send(b"wait 0.1 a\necho b")
    client.end()
    assert client.read_to_end() == b'{"text": "a"}\n{"text": "b"}\n'
    until(lambda: daemon.counters()["client_closed"] == 1)


# Orders that take their time


@pytest.mark.parametrize(("order", "answer"), LASTING)
def test_lasting_order_takes_its_time(daemon: Daemon, order: str, answer: bytes) -> None:
    client = connect(daemon)
    began = time.monotonic()
    client.send(f"{order}\nwho\n".encode())
    assert client.read(len(answer)) == answer
    assert json.loads(client.read_line())["lines"] == 1
    if not order.startswith("flood"):
        assert time.monotonic() - began >= 2


def test_others_are_served_meanwhile(daemon: Daemon) -> None:
    waiting = [connect(daemon) for _ in range(100)]
    for client in waiting:
        client.send(b"wait 3600 a\n")
    flooded, dripping, stalled = connect(daemon), connect(daemon), connect(daemon)
    flooded.send(b"flood 1073741824\n")
    dripping.send(b"drip 65536 3600\n")
    stalled.send(b"stall\n")
    until(lambda: daemon.counters()["accepted"] == 103)
    assert daemon.connect().ask(b"hello") == b"HELLO"
    assert ask(connect(daemon), b"echo a") == {"text": "a"}
    assert all(map(is_silent, waiting))


def test_nothing_is_read_of_a_client_that_stalls(daemon: Daemon) -> None:
    client = connect(daemon)
    begun(daemon, client, "stall")
    before = daemon.counters()["received_bytes"]
    client.socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while client.socket.send(b"who\n" * 4096):
            pass
    assert daemon.counters()["received_bytes"] == before
    assert not select.select([], [client.socket], [], 0)[1]


@pytest.mark.parametrize("order", ["wait 3600 a", "drip 65536 3600", "stall", "flood 1073741824"])
def test_client_that_resets_is_noticed(daemon: Daemon, order: str) -> None:
    client = connect(daemon)
    begun(daemon, client, order)
    client.reset()
    until(lambda: daemon.counters()["open"] == 0)
    assert daemon.counters()["reset"] == 1


@pytest.mark.parametrize("order", [b"wait 3600 a\n", b"stall\nwho\n"])
def test_local_client_that_leaves_is_noticed(tmp_path: Path, order: bytes) -> None:
    """Its end is a hang-up, which epoll reports whatever is waited for."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        with serving(CountingServer(listeners=[Listener(listening.dup(), "lab")])) as server:
            client = Client(path)
            client.send(order)
            until(lambda: waiting(server))
            client.close()
            until(lambda: not len(server.connections))


def test_waiting_costs_no_loop_iterations() -> None:
    with serving(lab_server()) as server, connected(server) as client:
        for order in (b"wait 3600 a\n", b"who\n"):
            client.send(order)
        client.end()
        until(lambda: waiting(server))
        server.comes_to_rest()


def test_timeouts_do_not_end_an_order_in_progress() -> None:
    with Daemon(listen=LISTEN, idle_timeout=0.2, line_timeout=0.2, write_timeout=0.2) as daemon:
        client = connect(daemon)
        client.send(b"wait 0.6 a\nstall 0.6\ndrip 3 1.5\necho b\n")
        assert client.read_to_end() == b'{"text": "a"}\n..\n{"text": "b"}\n'
        assert daemon.counters()["idle_timeout"] == 1


def test_client_that_does_not_read_a_flood_is_reset() -> None:
    with Daemon(listen=LISTEN, write_timeout=0.5) as daemon:
        client = connect(daemon)
        client.send(b"flood 1073741824\n")
        until(lambda: daemon.counters()["write_timeout"] == 1)
        with pytest.raises(ConnectionResetError):
            client.read_to_end()


def test_many_orders_are_left_in_the_kernel() -> None:
    with serving(lab_server()) as server, connected(server) as client:
        client.socket.setblocking(False)
        sizes: list[int] = []

        def send_more() -> bool:
            with contextlib.suppress(BlockingIOError):
                client.socket.send(b"who\n" * 16384)
            found = list(server.connections)
            sizes.extend(len(one.protocol.held) for one in found)
            return bool(found and found[0].protocol.lines >= 20)

        until(send_more)
        assert 0 < max(sizes) <= 2 * ORDER_MAX


def test_many_deadlines_are_spread_over_loop_iterations() -> None:
    """Those of 100 waits that are due at the same time, because the server does not run before."""
    with lab_server() as server:
        clients = [Client(address_of(server)) for _ in range(100)]
        for client in clients:
            client.send(b"wait 0.5 a\n")

        def lines_after_an_iteration() -> int:
            server.run_once(0)
            return sum(one.protocol.lines for one in server.connections)

        until(lambda: lines_after_an_iteration() or waiting(server) == 100)
        due = time.monotonic() + 0.6
        until(lambda: time.monotonic() > due)
        lines = [0]
        while lines[-1] < 100:
            lines.append(lines_after_an_iteration())
        assert max(after - before for before, after in pairwise(lines)) <= Deadlines.AT_MOST
        for client in clients:
            assert client.read_line() == b'{"text": "a"}\n'
            client.close()


# Reloads, restarts and stops


def test_orders_in_progress_outlive_a_reload_and_two_restarts(service: Service) -> None:
    service.name = "lab"
    with service.daemon() as daemon:
        clients = [service.connect(4096) for _ in LASTING]
        for client in clients:
            ask(client, b"who")
        began = time.monotonic()
        for client, (order, _) in zip(clients, LASTING, strict=True):
            begun(daemon, client, order)
        for client in clients:
            client.send(b"who\n")
        daemon.reload()
        service.manager.wait("READY=1")
    with service.daemon():
        pass
    with service.daemon() as daemon:
        for client, (order, answer) in zip(clients, LASTING, strict=True):
            assert client.read(len(answer)) == answer
            assert json.loads(client.read_line())["lines"] == 2
            if not order.startswith("flood"):
                assert time.monotonic() - began >= 2
            assert ask(client, b"echo still") == {"text": "still"}
        assert daemon.counters()["state_unreadable"] == 0


def test_time_that_is_left_is_what_is_handed_over(service: Service) -> None:
    service.name = "lab"
    orders = ("wait 1000 a", "drip 65536 1000", "stall 1000")
    with service.daemon(workers=1) as daemon:
        earliest = time.monotonic()
        for order in orders:
            begun(daemon, service.connect(), order)
        latest = time.monotonic()
        until(lambda: time.monotonic() > latest + 1)
        at_least = time.monotonic() - latest
    at_most = time.monotonic() - earliest
    connections: list[Connection] = []
    while len(connections) < len(orders):
        connections += receive(service.manager.stored[RECEIVE_END], 65536)
    send(service.manager.stored[SEND_END], connections)
    for connection in connections:
        connection.socket.close()
        [left] = re.findall(rb"[0-9]+\.[0-9]{3}", connection.state.held)
        # A hundredth of a second for what is rounded.
        assert 1000 - at_most - 0.01 <= float(left) <= 1000 - at_least + 0.01
    with service.daemon() as daemon:
        assert daemon.counters()["open"] == len(orders)


def test_ends_that_were_ordered_are_those_of_the_next_daemon(service: Service) -> None:
    service.name = "lab"
    with service.daemon() as daemon:
        reset, half = service.connect(), service.connect()
        begun(daemon, reset, "wait 2 a\nreset")
        begun(daemon, half, "half-close")
        assert half.read_to_end() == b""
    with service.daemon() as daemon:
        assert reset.read_line() == b'{"text": "a"}\n'
        with pytest.raises(ConnectionResetError):
            reset.read_line()
        half.send(b"who\n")
        until(lambda: daemon.counters()["open"] == 1)
        half.end()
        until(lambda: daemon.counters()["open"] == 0)


def test_stop_gives_up_orders_in_progress() -> None:
    """It does not wait until drain_timeout, after which it would reset the connection."""
    orders = ("wait 3600 a", "drip 65536 3600", "stall", "flood 1073741824", "half-close")
    with Daemon(listen=LISTEN, drain_timeout=1000) as daemon:
        clients = [connect(daemon) for _ in orders]
        for client, order in zip(clients, orders, strict=True):
            begun(daemon, client, order)
        daemon.process.terminate()
        for client in clients:
            assert len(client.read_to_end()) < 2**30
        assert daemon.wait() == 0
        assert "drain_timeout expired" not in daemon.log


def test_stop_does_not_send_the_rest_of_a_flood() -> None:
    """Only what has been taken out of it."""
    with lab_server() as server, connected(server, 4096) as client:
        client.send(b"flood 1073741824\n")

        def is_clogged() -> bool:
            server.run_once(0)
            return any(one.unsent for one in server.connections)

        until(is_clogged)
        server.drain()
        assert all(one.protocol.finished for one in server.connections)


# Help


def lab_server() -> CountingServer:
    listener = small_listener()
    return CountingServer(listeners=[Listener(listener.socket, "lab")], config=Config(workers=1))


def waiting(server: CountingServer) -> int:
    """The number of connections that wait until it is time to proceed."""
    return sum(bool(one.protocol.proceeds_at) for one in server.connections)
