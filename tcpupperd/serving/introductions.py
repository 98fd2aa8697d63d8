"""Introductions: which load balancers may introduce clients, and whom they introduce.

What is refused is counted and logged with the reason, for whoever runs the load balancer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tcpupperd.address import Networks, written
from tcpupperd.events import Event, client_fields
from tcpupperd.host.messages import RateLimitedLog
from tcpupperd.serving.connection import Connection
from tcpupperd.serving.counters import PROXY_UNTRUSTED, Tally
from tcpupperd.serving.proxy import Header, HeaderProtocol

log = logging.getLogger(__name__)


class Introductions:
    """Those that one server gets."""

    def __init__(self, trusted: Iterable[str], tally: Tally) -> None:
        self._trusted = Networks(trusted)
        self._tally = tally
        self._refusals = RateLimitedLog(log)

    def accepted_from(self, address: object) -> bool:
        """Whether the load balancer with this address may introduce clients."""
        if address in self._trusted:
            return True
        self._refuse(PROXY_UNTRUSTED, address, "the address is not in proxy_from")
        return False

    def of(self, connection: Connection) -> tuple[object, bytes] | None:
        """The address of the client that was introduced, and what it has sent already; None if
        none was."""
        header, balancer = connection.protocol, connection.client_address
        assert isinstance(header, HeaderProtocol)
        found = header.introduction
        if isinstance(found, Header):
            return balancer if found.source is None else found.source, header.rest
        if found and not connection.reason:  # else it ends for another one, as in a stop
            connection.reason = "refused"
            self._refuse(found.counter, balancer, str(found))
        return None

    def _refuse(self, counter: int, balancer: object, reason: str) -> None:
        self._tally.add(counter)
        self._refusals.warn(
            "%s: PROXY header refused: %s",
            written(balancer),
            reason,
            extra=Event.PROXY_REFUSED.fields(**client_fields(balancer)),
        )
