"""What a service manager keeps for a service: its socket and its store, whichever daemon is
running."""

import signal
import socket
from typing import Any

from integration.client import Client, name_of
from integration.daemon import Daemon
from integration.manager import Manager


class Service:
    """What outlives the daemons."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.address = name_of(self.listener)
        self.name = "tcpupperd.socket"  # of the listening socket
        self.clients: list[Client] = []

    def daemon(self, *options: str, **settings: Any) -> Daemon:
        """A daemon that is passed the listening socket, followed by all that is stored. The end of
        its context is a stop for a restart."""
        passed = [(self.name, self.listener), *self.manager.stored.items()]
        daemon = Daemon(*options, manager=self.manager, passed=passed, **settings)
        daemon.ended_by = signal.SIGUSR2
        return daemon

    def connect(self, receive_buffer: int = 0) -> Client:
        """A client that outlives the daemons too."""
        client = Client(self.address, receive_buffer)
        self.clients.append(client)
        return client
