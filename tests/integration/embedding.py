"""A server in a thread of the test, as other programs' tests embed one."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from integration.client import Client
from integration.processes import DEADLINE
from tcpupperd.address import written
from tcpupperd.host.sockets import Listener
from tcpupperd.serving.server import UpperServer

Server = TypeVar("Server", bound=socketserver.BaseServer)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """A context in which a server serves; in the end it is shut down and closed."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    with server:
        thread.start()
        try:
            yield server
        finally:
            # From a thread, so that a shutdown that hangs fails this test and not the whole run.
            stopper = threading.Thread(target=server.shutdown, daemon=True)
            stopper.start()
            for one in (stopper, thread):
                one.join(DEADLINE)
                assert not one.is_alive(), "the server does not shut down"


def address_of(server: UpperServer) -> str:
    """The address of its first listener, as the daemon writes it."""
    return written(server.acceptor.listeners[0].socket.getsockname())


@contextmanager
def connected(server: UpperServer, receive_buffer: int = 0) -> Iterator[Client]:
    """A context with a client of a server."""
    client = Client(address_of(server), receive_buffer)
    try:
        yield client
    finally:
        client.close()


def small_listener(size: int = 16384) -> Listener:
    """A listener whose connections can send little ahead of what their clients read."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    return Listener(listening)
