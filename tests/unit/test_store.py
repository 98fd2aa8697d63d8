"""The channel, as the service manager has kept it or not."""

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Callable

import pytest

from tcpupperd.host.channel import GIVE_END, TAKE_END, Channel, HandoverError, open_channel, peek
from tcpupperd.processes.handover import Connection, give
from unit.channels import NOBODY, close, is_served_by, take_from

#: Of socket(7), not in Python's module.
SO_ATTACH_FILTER, SO_LOCK_FILTER = 26, 44


def test_channel_that_was_kept_is_taken_up(channel: Channel) -> None:
    give(channel.give, [])
    stored = {GIVE_END: channel.give, TAKE_END: channel.take}
    again = open_channel(stored, NOBODY, store=True)
    assert again == Channel(channel.give, channel.take, outlives_us=True)
    assert take_from(again) == []


@pytest.mark.parametrize("names", [["handover-give"], ["handover-take"], ["something else"]])
def test_channel_that_is_not_whole_is_replaced(no_leak: None, names: list[str]) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.close()
    channel = open_channel({names[0]: one}, NOBODY, store=False)
    assert one.fileno() == -1
    assert not channel.outlives_us
    give(channel.give, [])
    assert take_from(channel) == []
    close([channel.give, channel.take])


def shut_down(channel: Channel) -> None:
    channel.take.shutdown(socket.SHUT_RD)


def shut_down_the_other_way(channel: Channel) -> None:
    channel.give.shutdown(socket.SHUT_RD)


def drop_everything(channel: Channel) -> None:
    """By a filter that cannot be removed any more: socket(7)."""
    code = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0
    program = struct.pack("HP", 1, ctypes.addressof(code))
    channel.take.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    channel.take.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)


def mix_up(channel: Channel) -> None:
    """With an end of another channel."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.dup2(one.fileno(), channel.take.fileno())
    one.close()
    other.close()


@pytest.mark.parametrize("damage", [shut_down, shut_down_the_other_way, drop_everything, mix_up])
def test_channel_that_does_not_work_is_replaced(
    no_leak: None, damage: Callable[[Channel], None], caplog: pytest.LogCaptureFixture
) -> None:
    old = open_channel({}, NOBODY, store=False)
    damage(old)
    new = open_channel({GIVE_END: old.give, TAKE_END: old.take}, NOBODY, store=True)
    assert old.give.fileno() == old.take.fileno() == -1
    assert new.outlives_us
    give(new.give, [])
    assert take_from(new) == []
    assert "does not work" in caplog.text
    close([new.give, new.take])


@pytest.mark.parametrize("damage", [shut_down, drop_everything])
def test_connections_in_a_channel_that_does_not_work_are_not_lost(
    no_leak: None, damage: Callable[[Channel], None]
) -> None:
    old = open_channel({}, NOBODY, store=False)
    pairs = [socket.socketpair() for _ in range(3)]
    for _, server in pairs:
        give(old.give, [Connection(server, "")])
    damage(old)
    new = open_channel({GIVE_END: old.give, TAKE_END: old.take}, NOBODY, store=True)
    for client, server in pairs:
        (taken,) = take_from(new)
        assert is_served_by(client, taken.socket)
        close([client, server, taken.socket])
    close([new.give, new.take])


def test_options_that_another_process_has_set_are_undone(channel: Channel) -> None:
    """All processes share the sockets, and the next ones get them."""
    channel.take.setblocking(True)
    channel.take.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    stored = {GIVE_END: channel.give, TAKE_END: channel.take}
    again = open_channel(stored, NOBODY, store=True)
    assert again.take.fileno() >= 0
    give(again.give, [])
    assert take_from(again) == []
    with pytest.raises(BlockingIOError):
        take_from(again)


def test_channel_never_makes_anybody_wait(channel: Channel) -> None:
    """Even if a process has removed O_NONBLOCK, which the sockets share."""
    for end in (channel.give, channel.take):
        os.set_blocking(end.fileno(), True)
    with pytest.raises(BlockingIOError):
        take_from(channel)
    with pytest.raises(BlockingIOError):
        peek(channel.take)
    channel.give.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
    with contextlib.suppress(BlockingIOError):
        while True:
            give(channel.give, [])


def test_empty_message_is_not_the_end(channel: Channel) -> None:
    channel.give.send(b"")
    with pytest.raises(HandoverError):
        take_from(channel)
    give(channel.give, [])
    assert take_from(channel) == []
