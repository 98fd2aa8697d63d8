"""Messages with connections and their state, in a channel."""

import errno
import os
import socket
from typing import BinaryIO

import pytest

from outlive.channel import (
    BATCH,
    Channel,
    Format,
    HandoverError,
    discard,
    receive,
    send,
)
from unit.channels import close, is_served_by

FORM = Format(b"test", 1)


def read(file: BinaryIO, size: int, count: int) -> bytes:
    return file.read()


def forbidden(name: str, flags: int) -> int:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def put(channel: Channel, form: Format = FORM, state: bytes = b"state") -> socket.socket:
    """Put a connection into the channel; return its client."""
    client, ours = socket.socketpair()
    with ours:
        send(channel.send_end, form, [ours], lambda file: file.write(state))
    return client


@pytest.mark.usefixtures("many_in_flight")
def test_message_has_as_many_connections_as_fit(channel: Channel) -> None:
    pairs = [socket.socketpair() for _ in range(BATCH)]
    send(channel.send_end, FORM, [ours for _, ours in pairs], lambda file: file.write(b"state"))
    close(ours for _, ours in pairs)
    message = receive(channel.receive_end, FORM)
    assert message.read(read) == b"state"
    for (client, _), server in zip(pairs, found := message.sockets(), strict=True):
        assert is_served_by(client, server)
    close(client for client, _ in pairs)
    close(found)


@pytest.mark.parametrize("has_memfds", [True, False])
def test_copy_leaves_the_message_there(
    channel: Channel, *, has_memfds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_memfds:
        monkeypatch.setattr(os, "memfd_create", forbidden)
    with put(channel) as client:
        for copy in (True, True, False):
            message = receive(channel.receive_end, FORM, copy=copy)
            assert message.read(read) == b"state"
            [server] = message.sockets()
            with server:
                assert is_served_by(client, server)
        with pytest.raises(BlockingIOError):
            receive(channel.receive_end, FORM, copy=True)


def test_discarded_message_closes_its_connections(channel: Channel) -> None:
    with put(channel) as client:
        before = os.listdir("/proc/self/fd")
        discard(channel.receive_end)
        assert os.listdir("/proc/self/fd") == before
        assert client.recv(1) == b""
        with pytest.raises(BlockingIOError):
            discard(channel.receive_end)


@pytest.mark.parametrize("form", [Format(b"test", 2), Format(b"other", 1)])
def test_message_of_another_format_has_its_connections(channel: Channel, form: Format) -> None:
    with put(channel, form) as client, pytest.raises(HandoverError, match="format") as error:
        receive(channel.receive_end, FORM)
    close([client, *error.value.sockets])
    assert len(error.value.sockets) == 1


def test_earlier_version_can_be_read(channel: Channel) -> None:
    with put(channel):
        message = receive(channel.receive_end, Format(b"test", 3, earlier=(1,)))
        assert message.version == 1
        assert message.read(read) == b"state"
        close(message.sockets())


def test_state_of_holes_is_not_read(channel: Channel) -> None:
    client, ours = socket.socketpair()
    with client, ours:
        send(channel.send_end, FORM, [ours], lambda file: file.truncate(2**40))
        message = receive(channel.receive_end, FORM)
        with pytest.raises(HandoverError, match="has holes: 1099511627776 bytes") as error:
            message.read(read)
        close(error.value.sockets)


def test_other_descriptor_is_closed(channel: Channel) -> None:
    """Although its state can be read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        send(channel.send_end, FORM, [listener], lambda file: file.write(b"state"))
    message = receive(channel.receive_end, FORM)
    assert message.read(read) == b"state"
    with pytest.raises(HandoverError, match="not the expected kind of socket") as error:
        message.sockets()
    assert error.value.sockets == []
