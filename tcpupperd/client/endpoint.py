"""The server: its name in messages, its addresses, and connections to it."""

from __future__ import annotations

import errno
import os
import socket

from tcpupperd.errors import ExpectedError
from tcpupperd.words import host_of, written

TYPE_CHECKING = False  # as in typing, which the client does not import
if TYPE_CHECKING:
    from typing import TypeAlias

    #: The argument of `socket.connect`: the path of a Unix socket, or a tuple of host and port.
    SocketAddress: TypeAlias = str | bytes | tuple[object, ...]


#: From ip(7); not in Python's module before 3.12.
IP_BIND_ADDRESS_NO_PORT = 24


class Endpoint:
    """The server given on the command line."""

    def __init__(
        self,
        host: str,
        port: int,
        unix: str | None = None,
        family: int = socket.AF_UNSPEC,
        source: tuple[object, ...] | None = None,
    ) -> None:
        """``unix`` is the path of a Unix socket, instead of a host and a port. Only addresses of
        ``family`` are used, and connections come from the local address ``source`` of the same
        family."""
        self.host = host
        self.port = port
        self.unix = unix
        self.family = family
        self.source = source
        self._addresses: list[tuple[int, SocketAddress]] = []

    @property
    def name(self) -> str:
        """Its name in messages: the path, host:port or [IPv6 address]:port."""
        if self.unix is not None:
            return self.unix
        return written((self.host, self.port))

    def addresses(self) -> list[tuple[int, SocketAddress]]:
        """The families and addresses to try, in order, which are looked up only once; raises
        ExpectedError if there are none."""
        if not self._addresses:
            self._addresses = self._look_up()
        return self._addresses

    def _look_up(self) -> list[tuple[int, SocketAddress]]:
        """``@name`` is a Unix socket in the abstract namespace, as in systemd's units."""
        if self.unix is not None:
            path = "\0" + self.unix[1:] if self.unix.startswith("@") else self.unix
            return [(socket.AF_UNIX, path)]
        try:
            found = socket.getaddrinfo(self.host, self.port, self.family, socket.SOCK_STREAM)
        except UnicodeError as error:
            raise ExpectedError(f"cannot connect to '{self.host}': not a host name") from error
        except OSError as error:
            raise ExpectedError(f"cannot connect to {self.name}: {reason(error)}") from error
        return [(family, address) for family, _, _, _, address in found]

    def connect(self, timeout: float) -> socket.socket:
        """Connect to the first reachable address, trying each for up to ``timeout`` seconds."""
        addresses = self.addresses()
        return self._connect(addresses, [timeout for _ in addresses])

    def connect_within(self, timeout: float) -> socket.socket:
        """Connect to the first reachable address, trying each for an equal share of ``timeout``
        seconds. The caller limits the time for the last one, and for all that follows."""
        addresses = self.addresses()
        shares = [timeout / len(addresses)] * (len(addresses) - 1)
        server = self._connect(addresses, [*shares, None])
        server.settimeout(None)
        return server

    def _connect(
        self, addresses: list[tuple[int, SocketAddress]], limits: list[float | None]
    ) -> socket.socket:
        last: OSError | None = None
        for (family, address), limit in zip(addresses, limits, strict=True):
            server = socket.socket(family)
            try:
                server.settimeout(limit)
                self._bind(server)
                server.connect(address)
                return server
            except OSError as error:
                server.close()
                last = error
        assert last
        raise ExpectedError(f"cannot connect to {self.name}: {reason(last)}") from last

    def begin(self, family: int, address: SocketAddress) -> socket.socket:
        """Start connecting to an address; the socket becomes writable when this is done."""
        server = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if family != socket.AF_UNIX:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._bind(server)
            # EAGAIN means that the accept queue of a Unix socket is full, and it is final.
            if (number := server.connect_ex(address)) not in (0, errno.EINPROGRESS):
                raise OSError(number, os.strerror(number))
        except OSError:
            server.close()
            raise
        return server

    def _bind(self, server: socket.socket) -> None:
        if self.source is None:
            return
        # The kernel then chooses the port only when it connects, so that connections to different
        # servers can share a port.
        server.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        try:
            server.bind(self.source)
        except OSError as error:
            failure = f"cannot bind to local address {host_of(self.source)}: {reason(error)}"
            raise OSError(error.errno, failure) from error


def ends(connection: socket.socket) -> str:
    """The remote address of a connection and, if there is one, the local address."""
    there, here = written(connection.getpeername()), connection.getsockname()
    return f"to {there} from {written(here)}" if here else f"to {there}"


def reason(error: OSError) -> str:
    """The error message without the number; Python's own timeouts have no number."""
    return error.strerror or str(error)
