"""Any number of connections with any state, given to and taken from a channel."""

import logging
import socket

import pytest

from outlive.channel import BATCH, Channel, Format, receive_all, send, send_all
from unit.channels import close, is_served_by

FORM = Format(b"test", 1)


def test_any_number_arrives_in_order(channel: Channel) -> None:
    pairs = [socket.socketpair() for _ in range(2 * BATCH + 5)]
    states = [bytes([number % 256]) * (number % 7) for number in range(len(pairs))]
    send_all(channel.send_end, FORM, list(zip((ours for _, ours in pairs), states, strict=True)))
    assert all(ours.fileno() == -1 for _, ours in pairs)
    taken = list(receive_all(channel.receive_end, FORM))
    assert [state for _, state in taken] == states
    for (client, _), (server, _) in zip(pairs, taken, strict=True):
        assert is_served_by(client, server)
    close(client for client, _ in pairs)
    close(server for server, _ in taken)


def test_nothing_is_nothing(channel: Channel) -> None:
    send_all(channel.send_end, FORM, [])
    assert list(receive_all(channel.receive_end, FORM)) == []


@pytest.mark.parametrize(
    ("form", "state"),
    [
        (Format(b"test", 2), b"\0\0\0\0"),
        (Format(b"other", 1), b"\0\0\0\0"),
        (FORM, b""),
        (FORM, b"\0\0\0"),
        (FORM, b"\0\0\0\5four"),
        (FORM, b"\xff\xff\xff\xffx"),
        (FORM, b"\0\0\0\1xy"),
    ],
)
def test_unreadable_connection_is_closed_and_the_rest_is_taken(
    channel: Channel, form: Format, state: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    lost, ours = socket.socketpair()
    with lost, ours:
        send(channel.send_end, form, [ours], lambda file: file.write(state))
    client, whole = socket.socketpair()
    send_all(channel.send_end, FORM, [(whole, b"whole")])
    with client:
        [(server, found)] = receive_all(channel.receive_end, FORM)
        assert found == b"whole"
        assert is_served_by(client, server)
        server.close()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("closing 1 connection whose state cannot be restored: ")


def test_huge_state_is_not_read(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    client, ours = socket.socketpair()
    with client, ours:
        send(channel.send_end, FORM, [ours], lambda file: file.truncate(2**40))
    assert list(receive_all(channel.receive_end, FORM)) == []
    assert "the state has holes: 1099511627776 bytes" in caplog.text


def test_other_descriptor_is_closed(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    """Although its state can be read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        send_all(channel.send_end, FORM, [(listener, b"")])
    assert list(receive_all(channel.receive_end, FORM)) == []
    assert "not the expected kind of socket" in caplog.text
