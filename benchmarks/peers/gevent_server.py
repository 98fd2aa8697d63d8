"""gevent: code that reads as if it blocked, a greenlet for each connection."""

import sys
from socket import IPPROTO_TCP, TCP_NODELAY

from gevent.server import StreamServer
from gevent.socket import socket


def answer(connection: socket, address: tuple[str, int]) -> None:
    connection.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    with connection.makefile("rb") as lines:
        for line in lines:
            connection.sendall(line.upper())


StreamServer(("127.0.0.1", int(sys.argv[1])), answer, backlog=4096).serve_forever()
