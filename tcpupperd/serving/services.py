"""The services that a listener can have: a table, indexed by the name of the listener."""

from __future__ import annotations

from collections.abc import Callable

from tcpupperd.config import Config
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol, Protocol

#: Makes the protocol of a new connection.
Service = Callable[[Config], Protocol]


def upper(config: Config) -> Protocol:
    """Answers in upper case, with the configured framing."""
    if config.framing == "none":
        return ChunkProtocol(config.lines_per_connection)
    return LineProtocol(config.max_line, config.lines_per_connection)


#: By the name of a listener: FileDescriptorName= of systemd.socket(5).
SERVICES: dict[str, Service] = {"upper": upper}


def service_of(name: str) -> Service:
    """The service of a listener with this name. It is `upper` for any other name, because systemd
    by default names descriptors after the socket unit."""
    return SERVICES.get(name, upper)
