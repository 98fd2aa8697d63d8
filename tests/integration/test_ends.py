"""How a connection ends, by either side."""

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
from tcpupperd.serving.counters import LINES, PROBE, RESET
from tcpupperd.serving.fast_path import RECEIVE_SIZE
from tcpupperd.serving.server import UpperServer
from waiting import until


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
        # A reset may be seen before the data that was sent ahead of it.
        until(lambda: server.tally.numbers[RESET] + server.tally.numbers[PROBE] == 3)
        assert other.ask(b"after") == b"AFTER"
        assert len(server.connections) == 1
    assert caplog.records == []
