"""The log of connections that have ended: a message for each, at a limited rate."""

from __future__ import annotations

import contextlib
import logging
import math
import os

from tcpupperd.events import Event, client_fields
from tcpupperd.host import tcp_info
from tcpupperd.serving.connection import Connection
from tcpupperd.serving.poller import Poller
from tcpupperd.words import counted, written

log = logging.getLogger(__name__)

#: Messages of all workers together: per second on average, and in a burst. The unit allows more
#: (LogRateLimitBurst=), so that these messages never make the journal drop others.
RATE, BURST = 1000, 50_000

#: Seconds until the number of suppressed messages is logged.
SUMMARY_INTERVAL = 10.0


class ConnectionLog:
    """Logs connections that have ended, for one of several workers."""

    def __init__(self, workers: int, poller: Poller) -> None:
        self._rate = RATE / workers
        self._burst = BURST / workers
        self._allowed = self._burst  # messages, as of `_since`
        self._since = 0.0
        self._left_out = 0
        self._summary = poller.at(math.inf, self.log_summary)

    def ended(self, connection: Connection, now: float) -> None:
        """Log that a connection has ended, or count its message as suppressed."""
        if self._may_log(now):
            log.info(
                "%s: %s in %.1f s",
                connection,
                _end_of(connection),
                now - connection.began,
                extra=Event.CONNECTION_ENDED.fields(**about(connection, now)),
            )
            return
        if not self._left_out:
            self._summary.set(now + SUMMARY_INTERVAL)
        self._left_out += 1

    def log_summary(self) -> None:
        """Log the number of connections whose messages were suppressed, if any."""
        if self._left_out:
            log.warning(
                "%s ended without being logged (rate limit)",
                counted(self._left_out, "connection"),
                extra=Event.MESSAGES_DROPPED.fields(),
            )
        self._left_out = 0
        self._summary.cancel()

    def _may_log(self, now: float) -> bool:
        """Use up one of the allowed messages, if there are any left (a token bucket)."""
        self._allowed = min(self._burst, self._allowed + (now - self._since) * self._rate)
        self._since = now
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True


def _end_of(connection: Connection) -> str:
    """How a connection has ended; only those of clients have lines."""
    protocol, why = connection.protocol, connection.reason
    if protocol.is_privileged:
        return f"{protocol.service}: {why}"
    if protocol.problem:
        why += f": {protocol.problem},"
    return f"{why} after {counted(protocol.lines, 'line')}"


def about(connection: Connection, now: float) -> dict[str, object]:
    """The journal fields that describe a connection."""
    client, one = connection.client_address, connection.socket
    fields: dict[str, object] = {
        "TCPUPPERD_CLIENT": written(client),
        **client_fields(client),
        "TCPUPPERD_WORKER": os.getpid(),
        "TCPUPPERD_REASON": connection.reason,
        "TCPUPPERD_LINES": connection.protocol.lines,
        "TCPUPPERD_SERVICE": connection.protocol.service,
        "TCPUPPERD_DURATION_USEC": round((now - connection.began) * 1_000_000),
    }
    for name, text in connection.introduction.items():
        fields[f"TCPUPPERD_{name.upper()}"] = text
    with contextlib.suppress(OSError):  # it is closed, or is not a TCP connection
        fields["TCPUPPERD_CONNECTION"] = f"{tcp_info.cookie(one):x}"
        fields["TCPUPPERD_LISTENER"] = written(one.getsockname())
        received, sent = tcp_info.traffic(one, eof=connection.eof)
        fields |= {"TCPUPPERD_RECEIVED": received, "TCPUPPERD_SENT": sent}
    return fields
