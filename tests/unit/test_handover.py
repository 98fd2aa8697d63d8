"""Handing live connections over to another process, and taking them over."""

import contextlib
import io
import os
import socket
from typing import Any

import pytest

from outlive.channel import BATCH, Channel
from tcpupperd.processes.connection_format import (
    VERSION,
    Connection,
    RecordFormat,
    _pack,
    _read_all,
    send,
)
from tcpupperd.serving.connection import State
from unit.channels import close, is_served_by, receive_from, state_of, tcp_pairs

#: What a connection becomes, in parts: the head, the times, the sizes, and what they are of.
RECORD = "".join(
    (
        "0002",  # AF_INET
        "a112",
        "01",
        "0000000000000007",
        "4029000000000000400a0000000000000000000000000000",
        "0009000000040000000605",
        "000000000000000000",
        "0000",
        b"192.0.2.7".hex() + b"half".hex() + b"ANSWER".hex() + b"upper".hex(),
    )
)

STATES: list[dict[str, Any]] = [
    {},
    {"lines": 2**63 - 1, "idle_for": 12.5},
    {"held": b"half a li", "mid_line": True, "line_open_for": 3.25, "lines": 7},
    {"unsent": bytes(range(256)) * 4096, "eof": True},
    {"held": b"x" * 1_000_000, "unsent": b"Y" * 3_000_000, "mid_line": True},
    {"finished": True, "lingers_for": 1.5, "reason": "idle timeout"},
    {"finished": True, "lingers_for": -0.5, "eof": True},
    {"mid_line": True},
    {"service": "another"},
    {"open_for": 86400.5},
    {"introduction": {"balancer": "192.0.2.1", "tls_cn": "a b\\x0a=é"}},
    {"service": "proxy", "held": b"PROXY TCP4 192.0.2", "mid_line": True, "line_open_for": 0.5},
]


def test_record_is_the_same_on_every_machine() -> None:
    """In network byte order, without padding: it is read by the next version, too."""
    state = State(
        lines=7, held=b"half", mid_line=True, unsent=b"ANSWER", idle_for=12.5, line_open_for=3.25
    )
    with socket.socket(socket.AF_INET) as client, io.BytesIO() as file:
        _pack(file, Connection(client, ("192.0.2.7", 41234), state))
        size = file.tell()
        file.seek(0)
        assert file.read().hex() == RECORD
        file.seek(0)
        [record] = _read_all(RecordFormat.of(VERSION, 65536), file, size, 1)
    assert record[1:] == (("192.0.2.7", 41234), state)


@pytest.mark.parametrize(
    ("host", "state"),
    [*(("127.0.0.1", state) for state in STATES), ("::1", {})],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "fresh",
)
def test_connection_arrives_as_it_left(channel: Channel, host: str, state: dict[str, Any]) -> None:
    ((client, server),) = tcp_pairs(1, host)
    given = Connection(server, server.getpeername()[:2], State(**state))
    send(channel.send_end, [given])
    server.close()
    (taken,) = receive_from(channel)
    assert state_of(taken) == state_of(given)
    assert taken.socket.family == server.family
    assert taken.socket.getpeername() == client.getsockname()
    assert is_served_by(client, taken.socket)
    assert not os.get_inheritable(taken.socket.fileno())
    close([client, taken.socket])


@pytest.mark.parametrize("address", [("192.0.2.7", 5), ("2001:db8::7", 5), ""])
def test_client_of_another_family_than_the_socket_arrives(
    channel: Channel, address: object
) -> None:
    """As a PROXY header identifies it."""
    pairs = [socket.socketpair(), *tcp_pairs(1), *tcp_pairs(1, "::1")]
    send(channel.send_end, [Connection(server, address) for _, server in pairs])
    taken = receive_from(channel)
    assert [one.client_address for one in taken] == [address] * 3
    assert [one.socket.family for one in taken] == [server.family for _, server in pairs]
    close(one for pair in pairs for one in pair)
    close(one.socket for one in taken)


def test_interface_of_a_link_local_client_arrives(channel: Channel) -> None:
    ((client, server),) = tcp_pairs(1, "::1")
    send(channel.send_end, [Connection(server, ("fe80::1", 5, 0, socket.if_nametoindex("lo")))])
    (taken,) = receive_from(channel)
    assert taken.client_address == ("fe80::1%lo", 5)
    close([client, server, taken.socket])


def test_local_connection_arrives(channel: Channel) -> None:
    client, server = socket.socketpair()
    with client, server:
        send(channel.send_end, [Connection(server, b"")])
        (taken,) = receive_from(channel)
        with taken.socket:
            assert taken.client_address == ""
            assert is_served_by(client, taken.socket)


def test_host_that_is_not_utf8_arrives(channel: Channel) -> None:
    ((client, tcp),) = tcp_pairs(1, "::1")
    address = ("fe80::1%\udcff", 1)
    send(channel.send_end, [Connection(tcp, address)])
    (taken,) = receive_from(channel)
    assert taken.client_address == address
    close([client, tcp, taken.socket])


def test_no_connections_are_a_message_too(channel: Channel) -> None:
    send(channel.send_end, [])
    assert receive_from(channel) == []


def test_empty_channel_has_nothing_to_take(channel: Channel) -> None:
    with pytest.raises(BlockingIOError):
        receive_from(channel)


def test_channel_without_a_writer_has_ended(channel: Channel) -> None:
    send(channel.send_end, [])
    channel.send_end.close()
    assert receive_from(channel) == []
    with pytest.raises(EOFError):
        receive_from(channel)


@pytest.mark.usefixtures("many_in_flight")
def test_a_thousand_connections_travel_in_batches(channel: Channel) -> None:
    pairs = tcp_pairs(1000)
    given = [
        Connection(server, server.getpeername(), State(lines=number, held=b"%d" % number))
        for number, (_, server) in enumerate(pairs)
    ]
    for start in range(0, len(given), BATCH):
        send(channel.send_end, given[start : start + BATCH])
    close(server for _, server in pairs)
    # All of them are waiting in the channel now, and no other process has their sockets.
    sizes = []
    taken: list[Connection] = []
    while len(taken) < len(given):
        found = receive_from(channel)
        sizes.append(len(found))
        taken += found
    assert sizes == [BATCH, BATCH, BATCH, 1000 - 3 * BATCH]
    assert list(map(state_of, taken)) == list(map(state_of, given))
    assert all(
        is_served_by(client, connection.socket)
        for (client, _), connection in zip(pairs, taken, strict=True)
    )
    close(client for client, _ in pairs)
    close(connection.socket for connection in taken)


@pytest.mark.usefixtures("many_in_flight")
def test_channel_that_is_full_takes_no_more_and_loses_nothing(channel: Channel) -> None:
    client, server = socket.socketpair()
    given = 0
    # Full before there are more descriptors in flight than an ordinary user may have.
    channel.send_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    with client, server:
        with contextlib.suppress(BlockingIOError):
            while True:
                send(channel.send_end, [Connection(server, "", State(lines=given))])
                given += 1
        assert given
        for number in range(given):
            (taken,) = receive_from(channel)
            assert taken.state.lines == number
            taken.socket.close()
