"""A server in a thread of the test, as other programs' tests embed one."""

import select
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from integration.client import Client
from tcpupperd.host.sockets import Listener
from tcpupperd.serving.server import UpperServer
from tcpupperd.words import written
from waiting import DEADLINE, until

Server = TypeVar("Server", bound=socketserver.BaseServer)

ANY_PORT = ("127.0.0.1", 0)


class CountingServer(UpperServer):
    """Counts the turns of its loop: one that spins makes thousands in no time."""

    turns = 0

    def service_actions(self) -> None:
        super().service_actions()
        self.turns += 1

    def comes_to_rest(self) -> None:
        """Wait until it makes next to no turns: a busy machine may be late with some."""
        until(lambda: self._turns_in(0.3) <= 1)

    def _turns_in(self, seconds: float) -> int:
        before = self.turns
        time.sleep(seconds)  # what is measured, not a wait
        return self.turns - before


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """A context manager that runs a server, which is shut down and closed at the end."""
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


def endpoint_of(server: UpperServer) -> tuple[str, int]:
    """The host and port of its `server_address`."""
    assert isinstance(server.server_address, tuple)
    host, port, *_ = server.server_address
    return host, port


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


def is_silent(client: Client) -> bool:
    """Whether there is nothing to read, not even an end."""
    return not select.select([client.socket], [], [], 0)[0]
