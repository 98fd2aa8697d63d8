"""The server in a thread: how it starts, where it listens, and how it stops."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.client import Client
from integration.embedding import (
    ANY_PORT,
    CountingServer,
    address_of,
    connected,
    endpoint_of,
    serving,
    small_listener,
)
from integration.processes import descriptors
from tcpupperd.config import Config
from tcpupperd.host.sockets import Listener
from tcpupperd.serving.counters import ACCEPTED
from tcpupperd.serving.fast_path import ANSWERED
from tcpupperd.serving.server import UpperServer
from waiting import DEADLINE


def test_several_clients_are_served_at_the_same_time(server: CountingServer) -> None:
    def talk(name: int) -> None:
        with connected(server) as client:
            for number in range(50):
                line = b"client %d line %d " % (name, number) + b"x" * number * 10
                assert client.ask(line) == line.upper()
            client.send(b"".join(b"%d pipelined %d\n" % (name, n) for n in range(500)))
            client.end()
            answers.append(client.read_to_end())

    answers: list[bytes] = []
    threads = [threading.Thread(target=talk, args=(name,)) for name in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    expected = [
        b"".join(b"%d PIPELINED %d\n" % (name, n) for n in range(500)) for name in range(20)
    ]
    assert sorted(answers) == sorted(expected)
    assert server.tally.numbers[ACCEPTED] == 20


def test_all_are_served_while_one_never_stops_sending(server: CountingServer) -> None:
    with connected(server) as busy, connected(server) as other:
        sender = threading.Thread(target=flood, args=(busy,), daemon=True)
        reader = threading.Thread(target=drink, args=(busy,), daemon=True)
        sender.start()
        reader.start()
        for _ in range(100):
            assert other.ask(b"and me") == b"AND ME"
        assert sender.is_alive()
        busy.socket.shutdown(socket.SHUT_RDWR)
        sender.join(DEADLINE)
        reader.join(DEADLINE)


def flood(client: Client) -> None:
    with contextlib.suppress(OSError):
        while True:
            client.send(b"x" * 9999 + b"\n")


def drink(client: Client) -> None:
    with contextlib.suppress(OSError):
        while client.socket.recv(1 << 20):
            pass


@contextlib.contextmanager
def ends(server: UpperServer, *interval: float) -> Iterator[None]:
    """Serve in a thread, which ends here."""
    thread = threading.Thread(target=server.serve_forever, args=interval, daemon=True)
    thread.start()
    yield
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_shutdown_does_not_wait_for_a_poll_interval() -> None:
    with UpperServer(ANY_PORT) as server, ends(server, 3600):
        with connected(server) as client:
            assert client.ask(b"serving") == b"SERVING"
        server.shutdown()


def test_shutdown_before_serving_is_not_lost() -> None:
    for _ in range(50):
        with serving(UpperServer(ANY_PORT)):
            pass


def test_shutdown_comes_from_inside() -> None:
    class Last(UpperServer):
        def service_actions(self) -> None:
            super().service_actions()
            if self.tally.counts[ANSWERED]:
                self.shutdown()

    with Last(ANY_PORT) as server, connected(server) as client, ends(server):
        assert client.ask(b"last words") == b"LAST WORDS"


def test_server_can_serve_again() -> None:
    with UpperServer(ANY_PORT) as server:
        for _ in range(3):
            with ends(server):
                with connected(server) as client:
                    assert client.ask(b"again") == b"AGAIN"
                server.shutdown()


def test_server_without_anything_to_serve_ends() -> None:
    with UpperServer() as server:
        server.serve_forever()


def test_server_close_answers_received_data_and_closes_everything() -> None:
    before = descriptors(os.getpid())
    server = UpperServer(ANY_PORT)
    address = address_of(server)
    with connected(server) as early, connected(server) as late:
        early.send(b"never served before\n")
        late.send(b"half a line")
        server.server_close()
        assert early.read_to_end() == b"NEVER SERVED BEFORE\n"
        assert late.read_to_end() == b""
        with pytest.raises(ConnectionRefusedError):
            Client(address)
    assert descriptors(os.getpid()) == before


def test_server_close_waits_for_a_slow_reader() -> None:
    server = UpperServer(listeners=[small_listener()])
    lines = b"".join(b"line %d\n" % number for number in range(6000))
    with connected(server, receive_buffer=4096) as client:
        client.send(lines)
        while not any(handler.unsent for handler in list(server.connections)):
            server.handle_request()
        client.send(b"this has come, too\n")
        closer = threading.Thread(target=server.server_close, daemon=True)
        closer.start()
        assert client.read_line() == b"LINE 0\n"
        assert closer.is_alive()
        rest = lines.partition(b"\n")[2] + b"this has come, too\n"
        assert client.read_to_end() == rest.upper()
        closer.join(DEADLINE)
        assert not closer.is_alive()


def test_context_manager_leaves_no_descriptor() -> None:
    before = descriptors(os.getpid())
    with serving(UpperServer(ANY_PORT)) as server, connected(server) as client:
        assert client.ask(b"hello") == b"HELLO"
    assert descriptors(os.getpid()) == before


@pytest.mark.parametrize(
    ("where", "host"),
    [
        (("127.0.0.1", 0), "127.0.0.1"),
        (("localhost", 0), None),
        (("::1", 0), "::1"),
        (("::1", 0, 0, 0), "::1"),
        (("", 0), "::"),
    ],
)
def test_server_address_is_where_it_listens(where: Any, host: str | None) -> None:
    with serving(UpperServer(where)) as server:
        found, port = endpoint_of(server)
        assert host in (None, found)
        assert port > 0
        with socket.create_connection((found, port), timeout=DEADLINE) as client:
            client.sendall(b"hello\n")
            assert client.recv(100) == b"HELLO\n"


@pytest.mark.parametrize("abstract", [False, True])
def test_server_address_can_be_a_path(tmp_path: Path, abstract: bool) -> None:
    path = "\0" * abstract + str(tmp_path / "socket")
    with serving(UpperServer(path)) as server, connected(server) as client:
        assert isinstance(server.server_address, str | bytes)
        assert os.fsdecode(server.server_address) == path
        assert client.ask(b"hello") == b"HELLO"


def test_several_listeners_are_served_together(tmp_path: Path) -> None:
    listeners = [Listener(socket.create_server(ANY_PORT)), small_listener()]
    with serving(UpperServer(str(tmp_path / "socket"), listeners=listeners)) as server:
        for one in server.acceptor.listeners:
            with socket.socket(one.socket.family) as client:
                client.connect(one.socket.getsockname())
                client.sendall(b"hello\n")
                assert client.recv(100) == b"HELLO\n"


def test_idle_server_makes_no_turn(server: CountingServer, client: Client) -> None:
    assert client.ask(b"hello") == b"HELLO"
    server.comes_to_rest()


# Framing


def test_line_longer_than_max_line_is_answered_in_pieces() -> None:
    with (
        serving(UpperServer(ANY_PORT, config=Config(max_line=1000))) as server,
        connected(server) as client,
    ):
        client.send(b"x" * 1000)
        client.send(b"y" * 10)
        assert client.read(1010) == b"X" * 1000 + b"Y" * 10
        client.send(b"z" * 999)
        client.end()
        assert client.read_to_end() == b"Z" * 999


def test_without_framing_whatever_arrives_is_answered() -> None:
    with (
        serving(UpperServer(ANY_PORT, config=Config(framing="none"))) as server,
        connected(server) as client,
    ):
        client.send(b"no newline")
        assert client.read(10) == b"NO NEWLINE"
        client.end()
        assert client.read_to_end() == b""
