"""The channel that live connections travel through: who keeps it, and how it is found again."""

from __future__ import annotations

import logging
import socket
from typing import NamedTuple

from tcpupperd.host.notify import Notifier

log = logging.getLogger(__name__)

#: Bytes of the channel's buffer that are asked for; net.core.wmem_max caps it. The 208 KiB that it
#: has by default are full with 278 messages.
BUFFER = 2**22

#: Names under which the service manager keeps the ends of the channel.
GIVE_END, TAKE_END = "handover-give", "handover-take"


class Channel(NamedTuple):
    """The ends of a channel: to give into and to take from. All processes of the daemon share
    them, and if the service manager keeps them too, the channel outlives the daemon."""

    give: socket.socket
    take: socket.socket
    outlives_us: bool


def open_channel(stored: dict[str, socket.socket], notifier: Notifier, *, store: bool) -> Channel:
    """The channel that the service manager has `stored`, or else a new one.

    With `store`, a new one is given to the service manager. One that is whole is never replaced:
    connections may be waiting in it.
    """
    if stored.keys() == {GIVE_END, TAKE_END}:
        channel = Channel(stored[GIVE_END], stored[TAKE_END], True)
    else:
        for name, end in stored.items():
            log.warning("closing the stored socket %s, which is of no use", name)
            end.close()
            notifier.forget(name)
        channel = Channel(*socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET), store)
        if store:
            notifier.store(GIVE_END, channel.give.fileno())
            notifier.store(TAKE_END, channel.take.fileno())
    channel.give.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    channel.give.setblocking(False)
    channel.take.setblocking(False)
    return channel
