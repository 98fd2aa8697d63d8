"""A client that does not read, or only slowly."""

import select
import socket
import tracemalloc
from collections.abc import Iterator

import pytest

from integration.client import Client
from integration.embedding import CountingServer, connected, serving, small_listener
from tcpupperd.serving.counters import RESET
from tcpupperd.serving.fast_path import RECEIVE_SIZE
from tcpupperd.serving.server import UpperServer
from waiting import until


@pytest.fixture
def tight() -> Iterator[CountingServer]:
    """A server whose connections have small buffers."""
    with serving(CountingServer(listeners=[small_listener()])) as server:
        yield server


@pytest.fixture
def clogged(tight: CountingServer) -> Iterator[tuple[CountingServer, Client, bytes]]:
    """A server, a client of it that sends and does not read, and what it has sent."""
    with connected(tight, receive_buffer=4096) as client:
        yield tight, client, clog(tight, client)


def clog(server: CountingServer, client: Client) -> bytes:
    """Send until the server has something unsent and the kernel accepts no more."""

    def is_clogged() -> bool:
        (handler,) = list(server.connections)
        return bool(handler.unsent) and not select.select([], [client.socket], [], 0.1)[1]

    until(lambda: list(server.connections))
    return client.clog(is_clogged)


Clogged = tuple[CountingServer, Client, bytes]


def test_client_that_does_not_read_is_not_read_from(clogged: Clogged) -> None:
    server, client, sent = clogged
    (handler,) = list(server.connections)
    assert len(handler.unsent) <= RECEIVE_SIZE
    assert len(sent) > len(handler.unsent)
    server.comes_to_rest()
    with connected(server) as other:
        assert other.ask(b"hello") == b"HELLO"
    client.end()
    assert client.read_to_end() == sent.upper()


def test_half_closed_client_that_does_not_read_costs_nothing(clogged: Clogged) -> None:
    server, client, sent = clogged
    client.end()
    server.comes_to_rest()
    assert client.read_to_end() == sent.upper()


def test_client_that_does_not_read_may_reset(clogged: Clogged) -> None:
    server, client, _ = clogged
    client.reset()
    until(lambda: len(server.connections) == 0)
    assert server.tally.numbers[RESET] == 1


def test_client_that_never_reads_and_never_stops_is_bounded(tight: CountingServer) -> None:
    with connected(tight, receive_buffer=4096) as client:
        sent = clog(tight, client)
        # Both kernel buffers of either way, and one answer: far from what it wants to send.
        assert len(sent) < 16 << 20


def test_only_the_unsent_part_of_an_answer_stays_in_memory() -> None:
    client, request = socket.socketpair()
    with UpperServer() as server, client:
        request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RECEIVE_SIZE // 4)
        server.process_request(request, "")
        client.sendall(b"x" * (RECEIVE_SIZE - 1) + b"\n")
        tracemalloc.start()
        server.handle_request()
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        (handler,) = list(server.connections)
        assert 0 < len(handler.unsent) < RECEIVE_SIZE - 16384
        assert kept < len(handler.unsent) + 8192
        client.close()
