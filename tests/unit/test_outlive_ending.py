"""Ending connections: no answer is lost, and nobody can delay it."""

import socket
import struct
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from outlive.ending import ANSWERS_MAX, end

Pair = tuple[socket.socket, socket.socket]

#: For SO_RCVTIMEO, so that no test waits for ever.
TIMEOUT = 30


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A connection and its client, over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        sock, _ = listening.accept()
    client.settimeout(TIMEOUT)
    with client, sock:
        yield sock, client


def in_thread(connections: list[tuple[socket.socket, bytes]], seconds: float) -> threading.Thread:
    thread = threading.Thread(target=end, args=(connections, seconds), daemon=True)
    thread.start()
    return thread


def received(client: socket.socket) -> bytes:
    """Everything up to end of file."""
    with client.makefile("rb") as file:
        return file.read()


def test_what_is_unsent_arrives(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the end of file after it, without waiting for the client to close its side first."""
    monkeypatch.setattr("outlive.ending.LINGER", 10 * TIMEOUT)
    sock, client = pair
    data = bytes(range(256)) * 40_000
    thread = in_thread([(sock, data)], 10 * TIMEOUT)
    assert received(client) == data
    client.close()
    thread.join()
    assert sock.fileno() == -1


def test_what_has_arrived_is_answered(pair: Pair) -> None:
    sock, client = pair
    client.sendall(b"one two")
    client.shutdown(socket.SHUT_WR)
    end([(sock, b"before ", bytes.upper)], TIMEOUT)
    assert received(client) == b"before ONE TWO"


def test_unread_input_causes_no_reset(pair: Pair) -> None:
    sock, client = pair
    client.sendall(b"unread")
    thread = in_thread([(sock, b"answer")], TIMEOUT)
    assert received(client) == b"answer"
    client.sendall(b"more")
    client.close()
    thread.join()


def test_client_that_never_stops_sending_is_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much has arrived, it is answered only so many times."""
    monkeypatch.setattr("outlive.ending.RECEIVE_SIZE", 10)
    sock, client = pair
    client.sendall(bytes(20 * ANSWERS_MAX))
    client.shutdown(socket.SHUT_WR)
    end([(sock, b"", lambda data: b".")], TIMEOUT)
    assert received(client) == b"." * ANSWERS_MAX


def test_client_that_does_not_close_delays_nothing(pair: Pair) -> None:
    sock, client = pair
    begun = monotonic()
    end([(sock, b"bye")], TIMEOUT)
    assert monotonic() - begun < TIMEOUT / 2
    assert received(client) == b"bye"


def test_client_that_does_not_read_is_reset(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    sock, client = pair
    end([(sock, bytes(2**24))], 0.2)
    with pytest.raises(ConnectionResetError):
        received(client)
    assert caplog.messages == ["resetting 1 connection with unsent answers"]


def test_answer_that_fails_costs_its_own_connection(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    sock, client = pair
    other, other_client = socket.socketpair()
    for one in (client, other_client):
        one.sendall(b"five")
        one.shutdown(socket.SHUT_WR)

    def fail(data: bytes) -> bytes:
        return b"%d" % int(data)

    with other_client:
        end([(sock, b"", fail), (other, b"", bytes.upper)], TIMEOUT)
        assert other_client.recv(100) == b"FIVE"
    with pytest.raises(ConnectionResetError):
        received(client)
    assert caplog.records[0].exc_info


def test_client_that_has_gone_is_no_error(pair: Pair) -> None:
    sock, client = pair
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    end([(sock, b"to nobody")], TIMEOUT)
    assert sock.fileno() == -1


def test_connection_that_was_closed_already_is_no_error(pair: Pair) -> None:
    sock, client = pair
    sock.close()
    end([(sock, b"to nobody")], TIMEOUT)
    assert received(client) == b""


def test_ending_nothing_takes_no_time() -> None:
    end([], TIMEOUT)
