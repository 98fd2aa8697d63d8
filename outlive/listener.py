"""Listening sockets: the options that connections inherit, and accepting."""

from __future__ import annotations

import socket
from typing import Any


class Listener:
    """A listening socket and its name: FileDescriptorName= in systemd.socket(5)."""

    __slots__ = ("_kind", "name", "socket")

    def __init__(self, listening: socket.socket, name: str) -> None:
        self.socket = listening
        self.name = name
        self._kind = int(listening.family), int(listening.type), listening.proto

    def set_options(self, keepalive: float) -> None:
        """Make accepting non-blocking, and set the options that its connections inherit;
        `keepalive` as in `keepalive_options`."""
        # Between epoll and accept(2), the client may disconnect, or another process may be faster.
        self.socket.setblocking(False)
        if self.socket.family != socket.AF_UNIX:
            for level, option, value in (*CONNECTION_OPTIONS, *keepalive_options(keepalive)):
                self.socket.setsockopt(level, option, value)

    def accept(self) -> tuple[socket.socket, Any]:
        """Return a connection and the client's address, as `socket.socket.accept` does.

        That method converts the listener's family and type to enumeration members each time, which
        takes a third of its 3.2 microseconds; a whole connection takes 18. It is used only if
        Python lacks the private method on which it is built.
        """
        if _accept is None:
            return self.socket.accept()
        fd, client_address = _accept(self.socket)
        return socket.socket(*self._kind, fileno=fd), client_address


_accept = getattr(socket.socket, "_accept", None)

#: Options that connections inherit from their listener. TCP_NODELAY: no answer waits for the
#: acknowledgement of the previous one. TCP_NOTSENT_LOWAT: the kernel buffers little beyond what is
#: in flight. Otherwise, it accepts up to 4 MiB and reports the socket as writable only when a
#: third has been sent, so a slow but steady client would appear to have stopped.
CONNECTION_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 131072),
)

#: The number of unanswered keepalive probes after which the kernel drops a connection.
KEEPALIVE_PROBES = 4


def keepalive_options(seconds: float) -> tuple[tuple[int, int, int], ...]:
    """The socket options in tcp(7) that make the kernel probe a client after this many seconds of
    silence, and then up to four times over the same length of time; 0 means never."""
    interval = max(1, round(seconds / KEEPALIVE_PROBES))
    return (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(seconds)),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(seconds))),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
    )
