"""The number of open connections of each source of clients, and the limit on it."""

from __future__ import annotations

import logging
import math
from collections import Counter

from tcpupperd.address import source_of
from tcpupperd.events import Event, client_fields
from tcpupperd.host.messages import RateLimitedLog
from tcpupperd.words import host_of

log = logging.getLogger(__name__)


class Sources:
    """Counts connections by source, for max_connections_per_source."""

    def __init__(self, limit: float) -> None:
        self.limited = limit < math.inf  # otherwise there is no need to count
        self._limit = limit
        self._open: Counter[str] = Counter()
        self._refusals = RateLimitedLog(log)

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, client_address: object) -> bool:
        """Whether the source of a client is below the limit; a refusal is logged."""
        if not self.limited or self._open[source_of(client_address)] < self._limit:
            return True
        self._refusals.warn(
            "%s already has max_connections_per_source connections open; closed another",
            host_of(client_address),
            extra=Event.SOURCE_LIMIT.fields(**client_fields(client_address)),
        )
        return False

    def count(self, client_address: object, change: int = 1) -> None:
        """Count a new connection, or one that has ended (-1). Local clients are never limited."""
        source = source_of(client_address) if self.limited else ""
        if source:
            self._open[source] += change
            if not self._open[source]:
                del self._open[source]
