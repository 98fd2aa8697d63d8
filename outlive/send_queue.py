"""The send queue of a socket."""

from __future__ import annotations

import fcntl
import socket
import sys
from termios import TIOCOUTQ


def send_queue(one: socket.socket) -> int:
    """The number of bytes sent that the peer has not acknowledged, tcp(7), or received, unix(7):
    SIOCOUTQ, which is the same as TIOCOUTQ. An end of file over TCP counts as a byte."""
    return int.from_bytes(fcntl.ioctl(one, TIOCOUTQ, bytes(4)), sys.byteorder)
