"""Connections and channels, for tests of the handover."""

import socket
from collections.abc import Iterable

from outlive.channel import Channel
from outlive.notify import Notifier
from tcpupperd.processes.connection_format import Connection, receive
from waiting import DEADLINE

NOBODY = Notifier({})

#: That the connections may have been served with.
MAX_LINE = 2**20


def receive_from(channel: Channel) -> list[Connection]:
    """The connections of the next message."""
    return receive(channel.receive_end, MAX_LINE)


def tcp_pairs(count: int, host: str = "127.0.0.1") -> list[tuple[socket.socket, socket.socket]]:
    """Connections, each with the client's end first."""
    pairs = []
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        for _ in range(count):
            client = socket.create_connection(listening.getsockname()[:2], timeout=DEADLINE)
            pairs.append((client, listening.accept()[0]))
    return pairs


def close(sockets: Iterable[socket.socket]) -> None:
    for one in sockets:
        one.close()


def is_served_by(client: socket.socket, server: socket.socket) -> bool:
    """Whether the two are the ends of one connection."""
    client.settimeout(DEADLINE)
    server.setblocking(True)
    server.sendall(b"%d" % client.fileno())
    return client.recv(100) == b"%d" % client.fileno()


def state_of(connection: Connection) -> tuple[object, ...]:
    """All but the socket."""
    return connection.client_address, *connection.state
