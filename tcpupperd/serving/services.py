"""What is spoken on a listener: a row for each service, found by the listener's name."""

from __future__ import annotations

from collections.abc import Callable

from tcpupperd.config import Config
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol

#: Makes the protocol of a new connection.
Service = Callable[[Config], LineProtocol | ChunkProtocol]


def upper(config: Config) -> LineProtocol | ChunkProtocol:
    """Answers upper-cased, framed as the configuration says."""
    if config.framing == "none":
        return ChunkProtocol(config.lines_per_connection)
    return LineProtocol(config.max_line, config.lines_per_connection)


#: By the name of a listener: FileDescriptorName= of systemd.socket(5).
SERVICES: dict[str, Service] = {"upper": upper}


def service_of(name: str) -> Service:
    """What is spoken on a listener of this name: by default, as systemd names descriptors after
    the socket unit, `upper`."""
    return SERVICES.get(name, upper)
