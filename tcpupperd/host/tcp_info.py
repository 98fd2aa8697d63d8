"""What the kernel knows about a TCP socket. It costs nothing until requested, and stays with the
socket when it moves to another process."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from termios import FIONREAD
from typing import NamedTuple

from outlive.send_queue import send_queue

#: From asm-generic/socket.h; Python's socket module lacks it.
SO_COOKIE = 57

#: States of a connection, from linux/tcp_states.h. In CLOSE_WAIT, the client has closed its side;
#: in CLOSE, the connection has failed.
ESTABLISHED, CLOSE, CLOSE_WAIT = 1, 7, 8

#: Fields of `struct tcp_info` in linux/tcp.h: the state at offset 0, the bytes received at 128,
#: not sent yet at 144, sent at 200, and retransmitted at 208.
_TRAFFIC = struct.Struct("=B127xQ8xI52xQQ")

#: The state; milliseconds since data was last sent and received; bytes acknowledged and received.
_COUNTS = struct.Struct("=B43xI4xI64xQQ")

#: For a listening socket: the length of the accept queue (tcpi_unacked), its limit (tcpi_sacked).
_QUEUE = struct.Struct("=24x2I")

#: Milliseconds since data was last sent, or else since the handshake (tcpi_last_data_sent).
_LAST_DATA_SENT = struct.Struct("=44xI")


class Traffic(NamedTuple):
    """Bytes of data in both directions."""

    received: int
    sent: int  # including what the kernel has not sent yet


def cookie(one: socket.socket) -> int:
    """A number that no other socket has until the host is rebooted; ss(8) shows it, too.

    Raises OSError if the socket is closed.
    """
    return int.from_bytes(one.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


def traffic(one: socket.socket, *, eof: bool) -> Traffic:
    """The amount of data transferred over a TCP connection. `eof` says whether the client's
    half-close was read.

    Raises OSError if it is another kind of socket.
    """
    state, received, waiting, sent, again = _read(one, _TRAFFIC)
    # The kernel counts the client's FIN as a byte.
    return Traffic(received - (eof or state == CLOSE_WAIT), sent - again + waiting)


class Counts(NamedTuple):
    """What processes have received and sent over a connection."""

    state: int
    consumed: int  # bytes that processes have received
    written: int  # bytes that they have sent, acknowledged or not
    idle: float  # seconds since data arrived or was sent


def counts(one: socket.socket) -> Counts:
    """What processes have received and sent, exactly, for a connection that was accepted.

    Not tcpi_bytes_sent less tcpi_bytes_retrans: a retransmission that fails is in only one of
    them. Raises OSError if it is another kind of socket.

    The names in the comments are those of Linux 6.1.192 (Debian 12), in net/ipv4 unless stated
    otherwise. A connection begins with both counts at 0, and with rcv_nxt and snd_una after the
    SYNs (tcp_create_openreq_child in tcp_minisocks.c).
    """
    before = None
    # tcp_get_info (tcp.c) reads the state before it locks the socket, and the other numbers after
    # that: only if all are the same twice do they, and what was read in between, belong together.
    while True:
        state, sent_ago, received_ago, acked, received = _read(one, _COUNTS)
        if (state, acked, received) == before:
            break
        before = state, acked, received
        unread = int.from_bytes(fcntl.ioctl(one, FIONREAD, bytes(4)), sys.byteorder)
        unacked = send_queue(one)
    # Received is by how much rcv_nxt has advanced, a FIN included (tcp_rcv_nxt_update in
    # tcp_input.c, called by tcp_queue_rcv and tcp_ofo_queue). Unread (SIOCINQ, the same as
    # FIONREAD) is rcv_nxt - copied_seq without a FIN (tcp_ioctl in tcp.c, tcp_inq in
    # include/net/tcp.h); the FIN has also set the state (tcp_fin in tcp_input.c), and reading it
    # advances copied_seq (found_fin_ok in tcp_recvmsg_locked, tcp.c). Without SO_OOBINLINE,
    # unread ends before urgent data (tcp_inq), which is skipped, and the counts do not agree.
    # Acknowledged is by how much snd_una has advanced (tcp_snd_una_update in tcp_input.c), and
    # SIOCOUTQ is write_seq - snd_una (tcp_ioctl in tcp.c): together, all that was written.
    consumed = received - unread - (state != ESTABLISHED)
    return Counts(state, consumed, acked + unacked, min(sent_ago, received_ago) / 1000)


def time_in_queue(connection: socket.socket) -> float:
    """Seconds that a connection waited before it was accepted, to be called right after accepting;
    0 if the kernel does not say, as for a Unix socket."""
    try:
        return _read(connection, _LAST_DATA_SENT)[0] / 1000
    except OSError:
        return 0.0


def queue_of(listening: socket.socket) -> tuple[int, ...]:
    """The length of the accept queue, and its limit; nothing if the kernel does not say, as for a
    Unix socket."""
    try:
        return _read(listening, _QUEUE)
    except OSError:
        return ()


def _read(one: socket.socket, fields: struct.Struct) -> tuple[int, ...]:
    """Fields of `struct tcp_info`. Raises OSError if the kernel has none for this socket."""
    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, fields.size)
    try:
        return fields.unpack(info)
    except struct.error:  # an old kernel has fewer fields
        raise OSError(f"struct tcp_info has only {len(info)} bytes") from None
