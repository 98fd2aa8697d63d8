"""The two request handlers, for any `socketserver` server.

In `socketserver.TCPServer`, `ThreadingTCPServer`, `ForkingTCPServer` and their Unix counterparts,
they run like any handler: from beginning to end, and blocking. `UpperServer` does the same from
one epoll instance, without creating a handler for each connection.
"""

from __future__ import annotations

import socketserver

from tcpupperd.config import Config
from tcpupperd.serving.fast_path import RECEIVE_SIZE
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol


class UpperHandler(socketserver.StreamRequestHandler):
    """Answers each line in upper case when it is complete.

    If the server has an attribute `config`, its `max_line` and `lines_per_connection` apply;
    otherwise, the defaults do, and all lines of a connection are answered.
    """

    def handle(self) -> None:
        """Answer until the client's end of file, or the last allowed line."""
        config = getattr(self.server, "config", None) or Config()
        protocol = LineProtocol(config.max_line, config.lines_per_connection)
        while not protocol.finished:
            data = self.rfile.read1(RECEIVE_SIZE)
            self.wfile.write(protocol.receive(data) if data else protocol.receive_eof())


class ChunkHandler(socketserver.BaseRequestHandler):
    """Answers data in upper case as it arrives, like `framing = "none"`."""

    def handle(self) -> None:
        """Answer until the client's end of file, or the last allowed chunk."""
        config = getattr(self.server, "config", None) or Config()
        protocol = ChunkProtocol(config.lines_per_connection)
        while not protocol.finished:
            data = self.request.recv(RECEIVE_SIZE)
            self.request.sendall(protocol.receive(data) if data else protocol.receive_eof())


#: The handler for each framing.
HANDLERS: dict[str, type[socketserver.BaseRequestHandler]] = {
    "line": UpperHandler,
    "none": ChunkHandler,
}

#: The attributes that define a handler: a class that inherits all of these behaves the same.
STEPS = ("__init__", "setup", "handle", "finish")


def framing_of(handler: type[socketserver.BaseRequestHandler]) -> str:
    """The framing that a handler implements; raises TypeError if it implements none."""
    for framing, known in HANDLERS.items():
        if all(getattr(handler, step, None) is getattr(known, step) for step in STEPS):
            return framing
    raise TypeError(
        f"UpperServer supports only UpperHandler and ChunkHandler, not {handler.__name__}; use"
        " socketserver.ThreadingTCPServer for other handlers"
    )
