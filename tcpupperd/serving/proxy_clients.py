"""Services whose clients are identified by load balancers: by which, and which clients are served.

Rejections are counted and logged with the reason, for the administrator of the load balancer.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable

from tcpupperd.address import Networks
from tcpupperd.events import Event, client_fields
from tcpupperd.host.messages import RateLimitedLog
from tcpupperd.serving.connection import Connection
from tcpupperd.serving.connections import Connections
from tcpupperd.serving.counters import PROXY_UNTRUSTED, SOURCE_LIMIT, Tally, reason
from tcpupperd.serving.introduction import Introduction, introduction
from tcpupperd.serving.protocol import Protocol
from tcpupperd.serving.proxy import Header, HeaderError, HeaderProtocol
from tcpupperd.words import written

log = logging.getLogger(__name__)


class ProxyClients:
    """The clients of one service that load balancers identify with PROXY headers."""

    def __init__(
        self,
        connections: Connections,
        tally: Tally,
        refusal: Callable[[socket.socket, object], int | None],
        protocol: Callable[[object, Introduction], Protocol],
        trusted: Iterable[str],
    ) -> None:
        """`refusal` and `protocol` are those of the service that the clients use once they are
        identified."""
        self._trusted = Networks(trusted)
        self._connections = connections
        self._tally = tally
        self._refusal_of_client = refusal
        self._client_protocol = protocol
        self._refusals = RateLimitedLog(log)

    def refusal(self, request: socket.socket, balancer: object) -> int | None:
        """Why the load balancer at this address may not identify clients; None if it may."""
        if balancer in self._trusted:
            return None
        self._refuse(PROXY_UNTRUSTED, balancer, "the address is not in proxy_from")
        return PROXY_UNTRUSTED

    def protocol(self, service: str, balancer: object) -> Protocol:
        """The protocol for the connection of a load balancer; `service` is the name of the service
        up to the header."""
        return HeaderProtocol(self._successor, service)

    def _successor(
        self, connection: Connection, found: Header | HeaderError | None
    ) -> Protocol | None:
        if isinstance(found, Header):
            return self._serve(connection, found)
        if found and not connection.reason:  # otherwise it ended earlier, such as by a stop
            connection.reason = reason(found.counter)
            self._refuse(found.counter, connection.client_address, str(found))
        return None

    def _serve(self, connection: Connection, header: Header) -> Protocol | None:
        """The protocol for the client that a header identifies, or None if it is refused."""
        balancer = connection.client_address
        client = balancer if header.source is None else header.source
        refusal = self._refusal_of_client(connection.socket, client)
        connection.client_address = client
        if header.source is not None:
            connection.introduction = introduction(header, balancer)
        if refusal is not None or connection not in self._connections:  # a hook has closed it
            connection.reason = reason(SOURCE_LIMIT)  # already counted
            return None
        if self._tally.debug:
            log.debug("%s: connected through %s", written(client), written(balancer))
        protocol = self._client_protocol(client, connection.introduction)
        self._connections.sources.count(client)
        return protocol

    def _refuse(self, counter: int, balancer: object, problem: str) -> None:
        self._tally.add(counter)
        self._refusals.warn(
            "%s: PROXY header rejected: %s",
            written(balancer),
            problem,
            extra=Event.PROXY_REFUSED.fields(**client_fields(balancer)),
        )
