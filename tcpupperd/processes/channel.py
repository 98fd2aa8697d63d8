"""The channel for the hand-over of live connections: creating it, storing it, finding it again."""

from __future__ import annotations

import logging
import socket
from typing import NamedTuple

from tcpupperd.host.notify import Notifier

log = logging.getLogger(__name__)

#: The requested size of the channel's buffer, in bytes; net.core.wmem_max caps it. The default of
#: 208 KiB holds 278 messages.
BUFFER = 2**22

#: Names under which the service manager keeps the ends of the channel.
GIVE_END, TAKE_END = "handover-give", "handover-take"


class Channel(NamedTuple):
    """The two ends of a channel. All processes of the daemon share them; if the service manager
    keeps them too, the channel outlives the daemon."""

    give: socket.socket
    take: socket.socket
    outlives_us: bool


def open_channel(stored: dict[str, socket.socket], notifier: Notifier, *, store: bool) -> Channel:
    """Return the channel that the service manager has `stored`, or else a new one.

    With `store`, a new channel is stored with the service manager. A complete channel is never
    replaced: connections may be waiting in it.
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
