"""What the kernel knows of a connection. It costs nothing until it is asked for, and it stays with
the socket when that moves to another process."""

from __future__ import annotations

import socket
import struct
import sys
from typing import NamedTuple

#: Of asm-generic/socket.h; Python's module lacks it.
SO_COOKIE = 57

#: The state of a connection whose client has ended its side, of linux/tcp_states.h.
CLOSE_WAIT = 8

#: Fields of `struct tcp_info` in linux/tcp.h: the state at offset 0, the bytes received at 128,
#: those that are not sent yet at 144, those sent at 200, those of them sent again at 208.
_TCP_INFO = struct.Struct("=B127xQ8xI52xQQ")


class Traffic(NamedTuple):
    """Bytes of data in both directions."""

    received: int
    sent: int  # including what the kernel has yet to send


def cookie(one: socket.socket) -> int:
    """A number that no other socket has until the machine is started again; ss(8) shows it, too.

    Raises OSError if the socket is closed.
    """
    return int.from_bytes(one.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


def traffic(one: socket.socket, *, eof: bool) -> Traffic:
    """What went over a TCP connection. `eof` tells whether the end of the client's side was read.

    Raises OSError if it is another kind of socket.
    """
    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    state, received, waiting, sent, again = _TCP_INFO.unpack(info)
    # The kernel counts the end of the client's side as a byte.
    return Traffic(received - (eof or state == CLOSE_WAIT), sent - again + waiting)
