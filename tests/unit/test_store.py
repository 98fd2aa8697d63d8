"""The channel, as the service manager has kept it or not."""

import socket

import pytest

from tcpupperd.host.channel import GIVE_END, TAKE_END, Channel, open_channel
from tcpupperd.processes.handover import give
from unit.channels import NOBODY, close, take_from


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
