"""The channel, as the service manager has kept it or not."""

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Callable

import pytest

from outlive.channel import (
    RECEIVE_END,
    SEND_END,
    Channel,
    HandoverError,
    open_channel,
    peek,
)
from tcpupperd.processes.connection_format import Connection, send
from unit.channels import NOBODY, close, is_served_by, receive_from

#: Of socket(7), not in Python's module.
SO_ATTACH_FILTER, SO_LOCK_FILTER = 26, 44


def test_channel_that_was_kept_is_taken_up(channel: Channel) -> None:
    send(channel.send_end, [])
    stored = {SEND_END: channel.send_end, RECEIVE_END: channel.receive_end}
    again = open_channel(stored, NOBODY, store=True)
    assert again == Channel(channel.send_end, channel.receive_end, outlives_us=True)
    assert receive_from(again) == []


@pytest.mark.parametrize("names", [["handover-give"], ["handover-take"], ["something else"]])
def test_channel_that_is_not_whole_is_replaced(no_leak: None, names: list[str]) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.close()
    channel = open_channel({names[0]: one}, NOBODY, store=False)
    assert one.fileno() == -1
    assert not channel.outlives_us
    send(channel.send_end, [])
    assert receive_from(channel) == []
    close([channel.send_end, channel.receive_end])


def shut_down(channel: Channel) -> None:
    channel.receive_end.shutdown(socket.SHUT_RD)


def shut_down_the_other_way(channel: Channel) -> None:
    channel.send_end.shutdown(socket.SHUT_RD)


def drop_everything(channel: Channel) -> None:
    """By a filter that cannot be removed any more: socket(7)."""
    code = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0
    program = struct.pack("HP", 1, ctypes.addressof(code))
    channel.receive_end.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    channel.receive_end.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)


def mix_up(channel: Channel) -> None:
    """With an end of another channel."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.dup2(one.fileno(), channel.receive_end.fileno())
    one.close()
    other.close()


@pytest.mark.parametrize("damage", [shut_down, shut_down_the_other_way, drop_everything, mix_up])
def test_channel_that_does_not_work_is_replaced(
    no_leak: None, damage: Callable[[Channel], None], caplog: pytest.LogCaptureFixture
) -> None:
    old = open_channel({}, NOBODY, store=False)
    damage(old)
    new = open_channel({SEND_END: old.send_end, RECEIVE_END: old.receive_end}, NOBODY, store=True)
    assert old.send_end.fileno() == old.receive_end.fileno() == -1
    assert new.outlives_us
    send(new.send_end, [])
    assert receive_from(new) == []
    assert "does not work" in caplog.text
    close([new.send_end, new.receive_end])


@pytest.mark.parametrize("damage", [shut_down, drop_everything])
def test_connections_in_a_channel_that_does_not_work_are_not_lost(
    no_leak: None, damage: Callable[[Channel], None]
) -> None:
    old = open_channel({}, NOBODY, store=False)
    pairs = [socket.socketpair() for _ in range(3)]
    for _, server in pairs:
        send(old.send_end, [Connection(server, "")])
    damage(old)
    new = open_channel({SEND_END: old.send_end, RECEIVE_END: old.receive_end}, NOBODY, store=True)
    for client, server in pairs:
        (taken,) = receive_from(new)
        assert is_served_by(client, taken.socket)
        close([client, server, taken.socket])
    close([new.send_end, new.receive_end])


def test_options_that_another_process_has_set_are_undone(channel: Channel) -> None:
    """All processes share the sockets, and the next ones get them."""
    channel.receive_end.setblocking(True)
    channel.receive_end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    stored = {SEND_END: channel.send_end, RECEIVE_END: channel.receive_end}
    again = open_channel(stored, NOBODY, store=True)
    assert again.receive_end.fileno() >= 0
    send(again.send_end, [])
    assert receive_from(again) == []
    with pytest.raises(BlockingIOError):
        receive_from(again)


def test_channel_never_makes_anybody_wait(channel: Channel) -> None:
    """Even if a process has removed O_NONBLOCK, which the sockets share."""
    for end in (channel.send_end, channel.receive_end):
        os.set_blocking(end.fileno(), True)
    with pytest.raises(BlockingIOError):
        receive_from(channel)
    with pytest.raises(BlockingIOError):
        peek(channel.receive_end)
    channel.send_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
    with contextlib.suppress(BlockingIOError):
        while True:
            send(channel.send_end, [])


def test_empty_message_is_not_the_end(channel: Channel) -> None:
    channel.send_end.send(b"")
    with pytest.raises(HandoverError):
        receive_from(channel)
    send(channel.send_end, [])
    assert receive_from(channel) == []
