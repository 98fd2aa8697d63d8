"""One connection: a stream handler that is driven by readiness instead of by a thread."""

from __future__ import annotations

import fcntl
import logging
import math
import select
import socket
import socketserver
import sys
from typing import TYPE_CHECKING

from tcpupperd.address import written
from tcpupperd.serving.counters import (
    IDLE_TIMEOUT,
    LINE_TIMEOUT,
    WRITE_TIMEOUT,
)
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol

if TYPE_CHECKING:
    from tcpupperd.serving.server import UpperServer

log = logging.getLogger(__name__)

#: Bytes received at a time. One connection gets no more in a turn, so a client that sends
#: without pause cannot keep the others waiting.
RECEIVE_SIZE = 65536

#: Seconds that a client gets to end its side when the server has ended its own.
LINGER_TIME = 2.0

#: Seconds that a client who has just connected gets to be heard when the service stops. To it, a
#: connection that ends without any answer is a failure, where others have to expect an end.
NEWCOMER_TIME = 1.0

#: Chunks answered at the most before a connection is ended from this side. A client that never
#: stops sending would otherwise put the end off for ever.
LAST_CHUNKS = 64


class UpperHandler(socketserver.StreamRequestHandler):
    """Answers one client.

    Where the handlers of `socketserver` run from beginning to end in `__init__`, this one is set
    up there, and the server calls `handle` whenever the socket is ready and `finish` at the end.
    What it waits for follows from its state: to send while anything is `unsent`, else to receive.
    So a client that does not read is not read from.
    """

    # Ten thousand idle connections are meant to cost little: no __dict__ each.
    __slots__ = (
        "active",
        "client_address",
        "eof",
        "line_began",
        "lingers_until",
        "protocol",
        "request",
        "server",
        "source",
        "tick",
        "unsent",
    )

    protocol: LineProtocol | ChunkProtocol
    server: UpperServer

    def __init__(
        self, request: socket.socket, client_address: object, server: UpperServer
    ) -> None:
        self.request = request
        self.client_address = client_address
        self.server = server
        self.setup()

    def setup(self) -> None:
        """Make the socket ready for `handle`."""
        self.request.setblocking(False)
        self.protocol = self.server.new_protocol()
        self.unsent: memoryview | bytes = b""
        self.eof = False  # the client has ended its side
        self.active = self.server.now  # when bytes last moved, either way
        self.line_began = 0.0  # when the first byte of an unfinished line came, or 0
        self.lingers_until = 0.0  # set when our side is ended and the client's is not
        self.source = ""  # whom the server counts it for, if it does
        self.tick = 0  # of the server's deadlines

    def handle(self) -> None:
        """One turn: send what is left, or else receive once and answer at once.

        Raises BlockingIOError if the socket was not ready after all, and any other OSError if
        the connection has failed.
        """
        if self.unsent:
            self._flush()
            return
        server, protocol = self.server, self.protocol
        data = self.request.recv(RECEIVE_SIZE)
        before = protocol.lines
        if data:
            answer = protocol.receive(data)
        else:
            self.eof = True
            answer = protocol.receive_eof()
        self.active = server.now
        server.lines += protocol.lines - before
        if protocol.mid_line or self.line_began:
            self._time_line(protocol.lines - before)
        if server.debug:
            log.debug("%s: received %d bytes, answering %d", self.name, len(data), len(answer))
        if answer:
            self._send(answer)
        if protocol.finished and not self.unsent:
            self._flushed()

    def finish(self) -> None:
        """Close the socket."""
        self.request.close()

    def end(self) -> None:
        """Answer nothing more; flush, end our side and wait a little for the client's end."""
        self.protocol.finish()
        if not self.unsent:
            self._flushed()

    def drain(self) -> None:
        """Answer what has arrived, then end the connection from this side, unless it is new."""
        for _ in range(LAST_CHUNKS):
            if self.unsent or self.protocol.finished:
                return
            try:
                self.handle()
            except BlockingIOError:
                if self.is_new:
                    return
                break
        self.end()

    def linger_on(self) -> bool:
        """Linger for longer if the client has not acknowledged all answers yet; False if it has.

        Once closed here, the kernel would send on what it still has, but as soon as anything came
        from the client it would reset the connection and throw the answers away. It is the kernel
        that ends this, with an error, after `write_timeout` without progress.
        """
        if self.request.family == socket.AF_UNIX or not unacknowledged(self.request):
            return False
        patience = int(self.server.config.write_timeout * 1000)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        self.lingers_until = self.server.now + LINGER_TIME
        self.server.schedule(self)
        return True

    def deadline(self) -> tuple[float, int | None]:
        """When this connection is to be given up, and the counter that says why."""
        config = self.server.config
        if self.lingers_until:
            return self.lingers_until, None
        if self.unsent:
            return self.active + (config.write_timeout or math.inf), WRITE_TIMEOUT
        idle = self.active + (config.idle_timeout or math.inf)
        line = self.line_began + (config.line_timeout or math.inf) if self.line_began else math.inf
        return (line, LINE_TIMEOUT) if line < idle else (idle, IDLE_TIMEOUT)

    @property
    def is_new(self) -> bool:
        """Whether the client has only just connected and may be about to send its first line."""
        protocol, age = self.protocol, self.server.now - self.active
        silent = not (protocol.lines or protocol.mid_line or protocol.finished)
        return silent and age < NEWCOMER_TIME

    @property
    def interest(self) -> int:
        """The epoll events to wait for."""
        return select.EPOLLOUT if self.unsent else select.EPOLLIN

    @property
    def name(self) -> str:
        """The client as messages call it."""
        return written(self.client_address)

    def _time_line(self, answered: int) -> None:
        """Note when the line began that has not ended yet."""
        if not self.protocol.mid_line:
            self.line_began = 0.0
        elif answered or not self.line_began:
            self.line_began = self.active

    def _send(self, answer: bytes) -> None:
        """Send at once, and keep only what the kernel does not take."""
        try:
            sent = self.request.send(answer)
        except BlockingIOError:
            sent = 0
        self.server.bytes += sent
        if sent < len(answer):
            # A copy of the rest: a view of the whole would keep all of it in memory for as long as
            # the client does not read.
            self.unsent = memoryview(answer[sent:])
            self.server.watch(self)

    def _flush(self) -> None:
        """Send more of what is left; receive again when there is nothing left."""
        sent = self.request.send(self.unsent)
        self.active = self.server.now
        self.server.bytes += sent
        self.unsent = self.unsent[sent:]
        if self.unsent:
            return
        self.unsent = b""  # lets go of the answer
        self.server.watch(self)
        if self.protocol.finished:
            self._flushed()
        elif self.server.draining:
            self.drain()

    def _flushed(self) -> None:
        """All that will ever be answered is sent: close, if the client's side has ended too.

        If it has not, end ours and let the client read everything up to our end of file. To
        close with input unread would make the kernel reset the connection and throw away
        answers still on their way.
        """
        if self.eof:
            self.server.close_connection(self)
        elif not self.lingers_until:
            self.request.shutdown(socket.SHUT_WR)
            self.lingers_until = self.server.now + LINGER_TIME
            self.server.schedule(self)


def unacknowledged(connection: socket.socket) -> int:
    """Bytes that the kernel holds until the other side has acknowledged them: SIOCOUTQ of tcp(7),
    which is the same as TIOCOUTQ. An end of file counts as one."""
    from termios import TIOCOUTQ  # seldom needed: for a client that reads slower than we end

    count = fcntl.ioctl(connection, TIOCOUTQ, bytes(4))
    return int.from_bytes(count, sys.byteorder)
