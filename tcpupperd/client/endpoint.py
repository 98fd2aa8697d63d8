"""Where the server is: its name in messages, its addresses, connections to it."""

from __future__ import annotations

import socket

from tcpupperd.errors import ExpectedError

TYPE_CHECKING = False  # of typing, which the client does not import
if TYPE_CHECKING:
    from typing import TypeAlias

    #: What `socket.connect` takes: the path of a Unix socket, or a tuple with host and port.
    SocketAddress: TypeAlias = str | tuple[object, ...]


class Endpoint:
    """A server, as the command line tells of it."""

    def __init__(self, host: str, port: int, unix: str | None = None) -> None:
        """``unix`` is the path of a Unix socket, instead of a host and a port."""
        self.host = host
        self.port = port
        self.unix = unix

    @property
    def name(self) -> str:
        """Its name in messages: the path, host:port or [IPv6 address]:port."""
        if self.unix is not None:
            return self.unix
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def addresses(self) -> list[tuple[int, SocketAddress]]:
        """The families and addresses to try, in this order; ExpectedError if there is none.

        ``@name`` is a Unix socket in the abstract namespace, as in systemd's units.
        """
        if self.unix is not None:
            path = "\0" + self.unix[1:] if self.unix.startswith("@") else self.unix
            return [(socket.AF_UNIX, path)]
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise ExpectedError(f"cannot connect to '{self.host}': not a host name") from error
        except OSError as error:
            raise ExpectedError(f"cannot connect to {self.name}: {reason(error)}") from error
        return [(family, address) for family, _, _, _, address in found]

    def connect(self, timeout: float) -> socket.socket:
        """Connect to the first address that can be reached, with ``timeout`` seconds for each."""
        last: OSError | None = None
        for family, address in self.addresses():
            server = socket.socket(family)
            try:
                server.settimeout(timeout)
                server.connect(address)
                return server
            except OSError as error:
                server.close()
                last = error
        assert last
        raise ExpectedError(f"cannot connect to {self.name}: {reason(last)}") from last


def reason(error: OSError) -> str:
    """What is wrong, without the number; a timeout of Python itself has only words."""
    return error.strerror or str(error)
