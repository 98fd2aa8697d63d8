"""PROXY headers: which load balancers may send them, and the clients that they identify.

Rejections are counted and logged with the reason, for the administrator of the load balancer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tcpupperd.address import Networks, written
from tcpupperd.events import Event, client_fields
from tcpupperd.host.messages import RateLimitedLog
from tcpupperd.serving.connection import Connection
from tcpupperd.serving.counters import PROXY_UNTRUSTED, Tally, reason
from tcpupperd.serving.proxy import Header, HeaderProtocol

log = logging.getLogger(__name__)


class Introductions:
    """The PROXY headers that one server receives."""

    def __init__(self, trusted: Iterable[str], tally: Tally) -> None:
        self._trusted = Networks(trusted)
        self._tally = tally
        self._refusals = RateLimitedLog(log)

    def accepted_from(self, address: object) -> bool:
        """Whether the load balancer at this address may identify clients with a PROXY header."""
        if address in self._trusted:
            return True
        self._refuse(PROXY_UNTRUSTED, address, "the address is not in proxy_from")
        return False

    def of(self, connection: Connection) -> tuple[object, bytes] | None:
        """The client's address and the data it has already sent; None if there is no client."""
        header, balancer = connection.protocol, connection.client_address
        assert isinstance(header, HeaderProtocol)
        found = header.introduction
        if isinstance(found, Header):
            return balancer if found.source is None else found.source, header.rest
        if found and not connection.reason:  # otherwise another reason ended it, such as a stop
            connection.reason = reason(found.counter)
            self._refuse(found.counter, balancer, str(found))
        return None

    def _refuse(self, counter: int, balancer: object, problem: str) -> None:
        self._tally.add(counter)
        self._refusals.warn(
            "%s: PROXY header rejected: %s",
            written(balancer),
            problem,
            extra=Event.PROXY_REFUSED.fields(**client_fields(balancer)),
        )
