"""The server in a thread: its face as a `socketserver` server, and what a connection sees."""

import contextlib
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tools import need

from integration.client import Client
from integration.embedding import address_of, connected, serving, small_listener
from integration.processes import DEADLINE, cannot, cpu_time, descriptors, until
from tcpupperd.address import source_of
from tcpupperd.config import Config
from tcpupperd.host.sockets import Listener
from tcpupperd.serving.connection import Connection
from tcpupperd.serving.counters import (
    ACCEPTED,
    ERRORS,
    IDLE_TIMEOUT,
    LINE_TIMEOUT,
    LINES,
    REFUSED,
    RESET,
    WRITE_TIMEOUT,
)
from tcpupperd.serving.deadlines import Deadlines
from tcpupperd.serving.protocol import LineProtocol
from tcpupperd.serving.server import UpperServer
from tcpupperd.serving.turn import ANSWERED, RECEIVE_SIZE

ROOT = Path(__file__).parents[2]
ANY_PORT = ("127.0.0.1", 0)

#: Seconds by which a timeout may come late: a tick of a quarter, and a busy machine.
LATE = 2.0


class CountingServer(UpperServer):
    """Counts the turns of its loop: one that spins makes thousands in no time."""

    turns = 0

    def service_actions(self) -> None:
        super().service_actions()
        self.turns += 1

    def turns_in(self, seconds: float) -> int:
        """The turns within so many seconds, which is looked at, not waited for."""
        before = self.turns
        time.sleep(seconds)  # what is measured, not a wait
        return self.turns - before


@pytest.fixture
def server() -> Iterator[CountingServer]:
    with serving(CountingServer(ANY_PORT)) as server:
        yield server


@pytest.fixture
def client(server: CountingServer) -> Iterator[Client]:
    with connected(server) as client:
        yield client


def is_silent(client: Client) -> bool:
    """Whether there is nothing to read, not even an end."""
    return not select.select([client.socket], [], [], 0)[0]


# The face of socketserver


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


def test_shutdown_does_not_wait_for_a_poll_interval() -> None:
    with UpperServer(ANY_PORT) as server:
        thread = threading.Thread(target=server.serve_forever, args=(3600,), daemon=True)
        thread.start()
        with connected(server) as client:
            assert client.ask(b"serving") == b"SERVING"
        server.shutdown()
        thread.join(DEADLINE)
        assert not thread.is_alive()


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

    with Last(ANY_PORT) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with connected(server) as client:
            assert client.ask(b"last words") == b"LAST WORDS"
            thread.join(DEADLINE)
        assert not thread.is_alive()


def test_server_can_serve_again() -> None:
    with UpperServer(ANY_PORT) as server:
        for _ in range(3):
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            with connected(server) as client:
                assert client.ask(b"again") == b"AGAIN"
            server.shutdown()
            thread.join(DEADLINE)
            assert not thread.is_alive()


def test_server_without_anything_to_serve_ends() -> None:
    with UpperServer() as server:
        server.serve_forever()


def test_server_close_answers_what_has_come_and_closes_everything() -> None:
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
        assert host in (None, server.server_address[0])
        assert server.server_address[1] > 0
        with socket.create_connection(server.server_address[:2], timeout=DEADLINE) as client:
            client.sendall(b"hello\n")
            assert client.recv(100) == b"HELLO\n"


@pytest.mark.parametrize("abstract", [False, True])
def test_server_address_can_be_a_path(tmp_path: Path, abstract: bool) -> None:
    path = "\0" * abstract + str(tmp_path / "socket")
    with serving(UpperServer(path)) as server, connected(server) as client:
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


class Choosy(CountingServer):
    """Serves nobody."""

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.asked = request.getsockname(), client_address
        return False


def test_verify_request_refuses_politely() -> None:
    with serving(Choosy(ANY_PORT)) as server, connected(server) as client:
        assert client.read_to_end() == b""
        assert server.asked == (server.server_address, client.socket.getsockname())
        assert server.tally.numbers[REFUSED] == 1


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
    """Has a bug, but not for everybody."""

    __slots__ = ()

    def receive(self, data: bytes) -> bytes:
        if data == b"fail\n":
            raise ZeroDivisionError
        return super().receive(data)


class Failing(Careful):
    """Speaks the protocol that has a bug."""

    def new_connection(self, request: socket.socket, client_address: Any) -> Connection:
        connection = super().new_connection(request, client_address)
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
        assert server.tally.numbers[ERRORS] == 1
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
        assert server.tally.numbers[ERRORS] == 1


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


# Ends of a connection


def test_client_that_half_closes_gets_every_answer(client: Client) -> None:
    client.send(b"one\ntwo\n")
    client.end()
    assert client.read_to_end() == b"ONE\nTWO\n"


def test_final_line_without_newline_is_answered_at_the_end(
    server: CountingServer, client: Client
) -> None:
    client.send(b"one\ntwo")
    assert client.read_line() == b"ONE\n"
    assert is_silent(client)
    client.end()
    assert client.read_to_end() == b"TWO"
    until(lambda: server.tally.numbers[LINES] == 2)


def test_client_may_send_nothing_at_all(client: Client) -> None:
    client.end()
    assert client.read_to_end() == b""


def test_client_may_have_half_closed_before_it_is_accepted() -> None:
    server = UpperServer(ANY_PORT)
    with connected(server) as client:
        client.send(b"one\ntwo")
        client.end()
        with serving(server):
            assert client.read_to_end() == b"ONE\nTWO"


def test_answer_is_out_before_the_half_close(server: CountingServer, client: Client) -> None:
    assert client.ask(b"one") == b"ONE"
    client.end()
    assert client.read_to_end() == b""
    until(lambda: len(server.connections) == 0)


def test_server_closes_first_and_then_the_client() -> None:
    with (
        serving(CountingServer(ANY_PORT, config=Config(lines_per_connection=1))) as server,
        connected(server) as client,
    ):
        assert client.ask(b"one") == b"ONE"
        assert client.read_to_end() == b""
        client.end()
        until(lambda: len(server.connections) == 0)


def test_server_that_closes_first_does_not_wait_for_ever() -> None:
    with (
        serving(CountingServer(ANY_PORT, config=Config(lines_per_connection=1))) as server,
        connected(server) as client,
    ):
        client.send(b"one\n")
        assert client.read_to_end() == b"ONE\n"
        assert len(server.connections) == 1
        until(lambda: len(server.connections) == 0)


def test_close_with_input_unread_loses_no_answer() -> None:
    config = Config(lines_per_connection=1)
    with serving(UpperServer(ANY_PORT, config=config)) as server, connected(server) as client:
        client.send(b"one\n" + b"this is never read\n" * 50_000)
        assert client.read_to_end() == b"ONE\n"


def test_end_is_put_off_while_the_client_has_answers_to_read() -> None:
    config = Config(lines_per_connection=1)
    line = b"x" * 20_000 + b"\n"
    with (
        serving(CountingServer(listeners=[small_listener()], config=config)) as server,
        connected(server, receive_buffer=4096) as client,
    ):
        client.send(line)
        (handler,) = until(lambda: list(server.connections))
        first = until(lambda: handler.lingers_until)
        until(lambda: handler.lingers_until > first)
        client.send(b"this would have reset a closed connection")
        assert client.read_to_end() == line.upper()
        until(lambda: len(server.connections) == 0)


def test_last_answer_may_leave_in_several_pieces() -> None:
    config = Config(lines_per_connection=1)
    line = b"x" * (RECEIVE_SIZE - 1) + b"\n"
    with (
        serving(CountingServer(listeners=[small_listener()], config=config)) as server,
        connected(server, receive_buffer=4096) as client,
    ):
        client.send(line)
        (handler,) = until(lambda: list(server.connections))
        until(lambda: handler.unsent)
        assert client.read_to_end() == line.upper()


@pytest.mark.parametrize("framing", ["line", "none"])
def test_last_of_several_lines_ends_the_connection(framing: str) -> None:
    config = Config(lines_per_connection=3, framing=framing)
    with serving(UpperServer(ANY_PORT, config=config)) as server, connected(server) as client:
        for _ in range(3):
            assert client.ask(b"line") == b"LINE"
        assert client.read_to_end() == b""


def test_reset_ends_only_its_own_connection(
    server: CountingServer, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(server) as other:
        assert other.ask(b"before") == b"BEFORE"
        for data in (b"", b"half a line", b"a line\n" * 1000):
            with connected(server) as client:
                client.send(data)
                client.reset()
        until(lambda: server.tally.numbers[RESET] == 3)
        assert other.ask(b"after") == b"AFTER"
        assert len(server.connections) == 1
    assert caplog.records == []


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


# A client that does not read


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
    """Send until the server has something unsent and the kernel takes no more from us."""

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
    assert server.turns_in(0.3) <= 3
    with connected(server) as other:
        assert other.ask(b"hello") == b"HELLO"
    client.end()
    assert client.read_to_end() == sent.upper()


def test_half_closed_client_that_does_not_read_costs_nothing(clogged: Clogged) -> None:
    server, client, sent = clogged
    client.end()
    assert server.turns_in(0.3) <= 3
    assert client.read_to_end() == sent.upper()


def test_client_that_does_not_read_may_reset(clogged: Clogged) -> None:
    server, client, _ = clogged
    client.reset()
    until(lambda: len(server.connections) == 0)
    assert server.tally.numbers[RESET] == 1


def test_idle_server_makes_no_turn(server: CountingServer, client: Client) -> None:
    assert client.ask(b"hello") == b"HELLO"
    assert server.turns_in(0.3) <= 1


def test_client_that_never_reads_and_never_stops_is_bounded(tight: CountingServer) -> None:
    with connected(tight, receive_buffer=4096) as client:
        sent = clog(tight, client)
        # Both kernel buffers of either way, and one answer: far from what it wants to send.
        assert len(sent) < 16 << 20


def test_of_an_answer_only_what_is_unsent_stays_in_memory() -> None:
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


# Timeouts


@contextlib.contextmanager
def timed(**settings: float) -> Iterator[tuple[CountingServer, Client]]:
    """A server with short timeouts, and a client of it."""
    never = {"idle_timeout": 0.0, "line_timeout": 0.0, "write_timeout": 0.0}
    config = Config(**(never | settings))
    with (
        serving(CountingServer(listeners=[small_listener(4096)], config=config)) as server,
        connected(server, receive_buffer=4096) as client,
    ):
        assert client.ask(b"hello") == b"HELLO"
        yield server, client


def check_time(began: float, timeout: float) -> None:
    """That a timeout has come now, neither early nor late."""
    # The server takes the time once a turn, which may have begun just before we sent.
    assert timeout - 0.05 <= time.monotonic() - began <= timeout + LATE


def test_idle_connection_is_ended() -> None:
    with timed(idle_timeout=0.5) as (server, client):
        began = time.monotonic()
        assert client.ask(b"still here") == b"STILL HERE"
        assert client.read_to_end() == b""
        check_time(began, 0.5)
        assert server.tally.numbers[IDLE_TIMEOUT] == 1


def test_any_byte_keeps_a_connection_from_being_idle() -> None:
    with timed(idle_timeout=0.6) as (_, client):
        first = time.monotonic()
        while time.monotonic() < first + 1.5:
            client.send(b"x")
            time.sleep(0.1)  # the client's own pace
        began = time.monotonic() - 0.1
        assert is_silent(client)
        assert client.read_to_end() == b""
        check_time(began, 0.6)


def test_line_that_never_ends_is_ended() -> None:
    with timed(line_timeout=0.6) as (server, client):
        began = time.monotonic()
        while is_silent(client):
            client.send(b"x")
            time.sleep(0.05)  # the client's own pace
            assert time.monotonic() < began + DEADLINE
        check_time(began, 0.6)
        client.wait_for_end()
        assert server.tally.numbers[LINE_TIMEOUT] == 1


def test_line_timeout_begins_anew_with_each_line() -> None:
    with timed(line_timeout=0.6) as (server, client):
        first = time.monotonic()
        while time.monotonic() < first + 1.5:
            client.send(b"end\nbegin ")
            time.sleep(0.1)  # the client's own pace
        began = time.monotonic() - 0.1
        client.wait_for_end()
        check_time(began, 0.6)
        assert server.tally.numbers[LINE_TIMEOUT] == 1


def test_no_line_no_line_timeout() -> None:
    with timed(line_timeout=0.3) as (_, client):
        assert not select.select([client.socket], [], [], 1.0)[0]
        assert client.ask(b"a line at last") == b"A LINE AT LAST"


def test_client_that_does_not_read_is_cut() -> None:
    with timed(write_timeout=0.6) as (server, client):
        time.sleep(0.3)  # so that the first look, 0.6 after the connect, comes too early
        handler = stall(server, client)
        until(lambda: len(server.connections) == 0)
        check_time(handler.last_activity, 0.6)
        assert server.tally.numbers[WRITE_TIMEOUT] == 1
        # Its answers are lost, and it is told so: an end would look as if they were complete.
        with pytest.raises(ConnectionResetError):
            client.read_to_end()


def test_client_that_reads_slowly_is_not_cut() -> None:
    with timed(write_timeout=1.5) as (server, client):
        handler = stall(server, client)
        began = time.monotonic()
        while handler.unsent:
            taken = handler.last_activity
            while handler.unsent and handler.last_activity == taken:
                assert client.socket.recv(512)
                time.sleep(0.005)  # until the daemon has sent more
            time.sleep(0.25)  # the client's own pace
        assert time.monotonic() > began + 1.5 + Deadlines.TICK
        assert server.tally.numbers[WRITE_TIMEOUT] == 0
        client.end()
        assert client.read_to_end()


def stall(server: CountingServer, client: Client) -> Connection:
    """Send what is received at once and answered only in part, for want of a reader."""
    client.send(b"x" * (RECEIVE_SIZE - 1) + b"\n")
    (handler,) = list(server.connections)
    until(lambda: handler.unsent)
    return handler


def test_client_may_reset_in_the_turn_in_which_its_deadline_comes() -> None:
    with (
        UpperServer(ANY_PORT, config=Config(idle_timeout=0.3)) as server,
        connected(server) as client,
    ):
        server.handle_request()
        client.reset()
        until(lambda: server.poll_timeout() == 0)
        server.poller.look_at_clock()
        server.service_actions()  # where the reset is not known of yet
        assert len(server.connections) == 0
        assert server.tally.numbers[RESET] == 1


def test_without_timeouts_nothing_is_ever_looked_at() -> None:
    with timed() as (server, client):
        assert server.poll_timeout() is None
        client.send(b"half a line")
        assert not select.select([client.socket], [], [], 0.6)[0]
        assert server.poll_timeout() is None


# Limits


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
            assert server.turns_in(0.3) <= 3
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
        assert server.tally.numbers[REFUSED] == 1
        where = server.server_address
        with socket.create_connection(where, DEADLINE, ("127.0.0.2", 0)) as elsewhere:
            elsewhere.sendall(b"from elsewhere\n")
            assert elsewhere.recv(100) == b"FROM ELSEWHERE\n"
        clients[0].close()
        until(lambda: len(server.connections) == 1)
        with connected(server) as again:
            assert again.ask(b"in again") == b"IN AGAIN"


def test_source_that_is_gone_takes_no_memory() -> None:
    config = Config(max_connections_per_source=1)
    with serving(CountingServer(ANY_PORT, config=config)) as server:
        with connected(server) as client:
            assert client.ask(b"in") == b"IN"
            assert len(server.connections._sources) == 1
        until(lambda: len(server.connections._sources) == 0)


def test_one_ipv4_source_is_the_same_on_a_socket_for_both() -> None:
    config = Config(max_connections_per_source=1)
    with serving(CountingServer(("", 0), config=config)) as server:
        port = server.server_address[1]
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
        ("fe80::1%eth0", "fe80::2", True),
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
        pattern = "WARNING cannot accept: Too many open files; ([0-9]+) connections? open"
        served = int(until(lambda: re.search(pattern, log.read_text()))[1])
        assert 5 < served < 20
        for number, client in enumerate(clients[:served]):
            assert client.read_line() == b"CLIENT %d\n" % number
        before = cpu_time(pid)
        time.sleep(0.5)
        assert cpu_time(pid) - before < 0.1
        assert all(map(is_silent, clients[served:]))
        # Each that ends makes room for one that waits.
        for number in range(served, len(clients)):
            clients[number - served].close()
            assert clients[number].read_line() == b"CLIENT %d\n" % number
        stack.close()
        with contextlib.closing(Client(address)) as client:
            assert client.ask(b"room again") == b"ROOM AGAIN"
            until(lambda: "WARNING accepting again\n" in log.read_text())
        assert log.read_text().count("WARNING") == 2
