"""The timeouts of connections, each seen by the client."""

import contextlib
import select
import time
from collections.abc import Iterator
from functools import partial

import pytest

from integration.client import Client
from integration.embedding import (
    ANY_PORT,
    CountingServer,
    connected,
    is_silent,
    serving,
    small_listener,
)
from tcpupperd.config import Config
from tcpupperd.serving.connection import Connection
from tcpupperd.serving.counters import IDLE_TIMEOUT, LINE_TIMEOUT, RESET, WRITE_TIMEOUT
from tcpupperd.serving.deadlines import Deadlines
from tcpupperd.serving.fast_path import RECEIVE_SIZE
from tcpupperd.serving.server import UpperServer
from waiting import DEADLINE, until

#: Seconds by which a timeout may come late: a tick of a quarter, and a busy machine.
LATE = 2.0


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
    """Check that a timeout has expired now, neither early nor late."""
    # The server takes the time once a turn, which may have begun just before we sent.
    assert timeout - 0.05 <= time.monotonic() - began <= timeout + LATE


def test_idle_connection_is_ended() -> None:
    with timed(idle_timeout=0.5) as (server, client):
        began = time.monotonic()
        assert client.ask(b"still here") == b"STILL HERE"
        assert client.read_to_end() == b""
        check_time(began, 0.5)
        assert server.tally.numbers[IDLE_TIMEOUT] == 1


def send_at_a_pace(client: Client, data: bytes) -> float:
    """Send for longer than a timeout, and stop; the time at which it was last sent."""
    first = time.monotonic()
    while time.monotonic() < first + 1.5:
        client.send(data)
        time.sleep(0.1)  # the client's own pace
    return time.monotonic() - 0.1


def test_any_byte_keeps_a_connection_from_being_idle() -> None:
    with timed(idle_timeout=0.6) as (_, client):
        began = send_at_a_pace(client, b"x")
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


def test_line_timeout_restarts_with_each_line() -> None:
    with timed(line_timeout=0.6) as (server, client):
        began = send_at_a_pace(client, b"end\nbegin ")
        client.wait_for_end()
        check_time(began, 0.6)
        assert server.tally.numbers[LINE_TIMEOUT] == 1


def test_no_line_no_line_timeout() -> None:
    with timed(line_timeout=0.3) as (_, client):
        assert not select.select([client.socket], [], [], 1.0)[0]
        assert client.ask(b"a line at last") == b"A LINE AT LAST"


def test_client_that_does_not_read_is_reset() -> None:
    with timed(write_timeout=0.6) as (server, client):
        # The client's own pace: it is looked at 0.6 s after the connect, which is too early then.
        time.sleep(0.3)
        handler = stall(server, client)
        until(lambda: len(server.connections) == 0)
        check_time(handler.last_activity, 0.6)
        assert server.tally.numbers[WRITE_TIMEOUT] == 1
        # Its answers are lost, and it is told so: an end would look as if they were complete.
        with pytest.raises(ConnectionResetError):
            client.read_to_end()


def test_client_that_reads_slowly_is_not_reset() -> None:
    with timed(write_timeout=1.5) as (server, client):
        handler = stall(server, client)
        began = time.monotonic()
        while handler.unsent:
            until(partial(has_made_room, client, handler, handler.last_activity))
            time.sleep(0.25)  # the client's own pace
        assert time.monotonic() > began + 1.5 + Deadlines.TICK
        assert server.tally.numbers[WRITE_TIMEOUT] == 0
        client.end()
        assert client.read_to_end()


def has_made_room(client: Client, handler: Connection, before: float) -> bool:
    """Read a little; whether the server has sent more since `before`, or everything."""
    assert client.socket.recv(512)
    return not handler.unsent or handler.last_activity > before


def stall(server: CountingServer, client: Client) -> Connection:
    """Send what is received immediately but answered only in part, because no one reads."""
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
        until(lambda: server.poller.timeout() == 0)
        server.poller.update_clock()
        server.poller.finish()  # where the reset is not known of yet
        assert len(server.connections) == 0
        numbers = server.tally.numbers
        assert (numbers[IDLE_TIMEOUT], numbers[RESET]) == (1, 0)


def test_without_timeouts_nothing_is_ever_looked_at() -> None:
    with timed() as (server, client):
        assert server.poller.timeout() is None
        client.send(b"half a line")
        assert not select.select([client.socket], [], [], 0.6)[0]
        assert server.poller.timeout() is None
