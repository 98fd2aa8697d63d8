"""The extension points that the server in a thread has as a `socketserver` server."""

import select
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from integration.embedding import ANY_PORT, CountingServer, connected, is_silent, serving
from tcpupperd.serving.connection import Connection
from tcpupperd.serving.counters import ACCEPTED, BUG, SOURCE_LIMIT
from tcpupperd.serving.fast_path import ANSWERED
from tcpupperd.serving.protocol import LineProtocol
from tcpupperd.serving.server import UpperServer
from tcpupperd.serving.services import Service
from waiting import DEADLINE


class Choosy(CountingServer):
    """Serves no clients."""

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.asked = request.getsockname(), client_address
        return False


def test_verify_request_refuses_politely() -> None:
    with serving(Choosy(ANY_PORT)) as server, connected(server) as client:
        assert client.read_to_end() == b""
        assert server.asked == (server.server_address, client.socket.getsockname())
        assert server.tally.numbers[SOURCE_LIMIT] == 1


def test_verify_request_refuses_local_clients_too(tmp_path: Path) -> None:
    with serving(Choosy(str(tmp_path / "socket"))) as server:
        for _ in range(2):
            with connected(server) as client:
                assert client.read_to_end() == b""


class Careful(CountingServer):
    """Remembers the errors that it handles."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        self.handled = type(error), client_address
        super().handle_error(request, client_address)


class FailingProtocol(LineProtocol):
    """Has a bug, but not for all clients."""

    __slots__ = ()

    def receive(self, data: bytes) -> bytes:
        if data == b"fail\n":
            raise ZeroDivisionError
        return super().receive(data)


class Failing(Careful):
    """Speaks the protocol that has a bug."""

    def new_connection(
        self, request: socket.socket, client_address: Any, service: Service
    ) -> Connection:
        connection = super().new_connection(request, client_address, service)
        connection.protocol = FailingProtocol(1000)
        return connection


class FailingAtOnce(Careful):
    """Has a bug in one of its hooks, for every other client."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        super().finish_request(request, client_address)
        if self.tally.numbers[ACCEPTED] % 2:
            raise ZeroDivisionError


def test_handle_error_is_told_of_a_bug_and_the_others_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(Failing(ANY_PORT)) as server, connected(server) as other:
        assert other.ask(b"before") == b"BEFORE"
        with connected(server) as client:
            client.send(b"fail\n")
            client.wait_for_end()
            assert server.handled == (ZeroDivisionError, client.socket.getsockname())
        assert other.ask(b"after") == b"AFTER"
        assert server.tally.numbers[BUG] == 1
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info


def test_handle_error_is_told_of_a_bug_in_a_hook() -> None:
    with serving(FailingAtOnce(ANY_PORT)) as server:
        with connected(server) as client:
            client.wait_for_end()
            assert server.handled == (ZeroDivisionError, client.socket.getsockname())
        with connected(server) as other:
            assert other.ask(b"after") == b"AFTER"
        assert server.tally.numbers[BUG] == 1


def test_process_request_can_be_extended() -> None:
    class Greeting(UpperServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            request.sendall(b"welcome\n")
            super().process_request(request, client_address)

    with serving(Greeting(ANY_PORT)) as server, connected(server) as client:
        assert client.read_line() == b"welcome\n"
        assert client.ask(b"thanks") == b"THANKS"


def test_shutdown_request_loses_no_answer() -> None:
    class Once(UpperServer):
        def service_actions(self) -> None:
            super().service_actions()
            for connection in self.connections if self.tally.counts[ANSWERED] else ():
                self.shutdown_request(connection.socket)

    with serving(Once(ANY_PORT)) as server, connected(server) as client:
        client.send(b"one\n")
        assert client.read_to_end() == b"ONE\n"


def test_handle_request_is_one_turn() -> None:
    with UpperServer(ANY_PORT) as server, connected(server) as client:
        assert select.select([server], [], [], DEADLINE)[0]
        server.handle_request()
        assert server.tally.numbers[ACCEPTED] == 1
        assert is_silent(client)
        client.send(b"hello\n")
        assert select.select([server], [], [], DEADLINE)[0]
        server.handle_request()
        assert client.read_line() == b"HELLO\n"
