"""Stopping a server without losing an answer.

No new connections are admitted, those in the accept queues are accepted, input that has arrived is
answered, and each connection is closed once its answers are sent, or when `drain_timeout` expires.
"""

from __future__ import annotations

import logging
import math
from functools import partial

from tcpupperd.events import Event
from tcpupperd.host.handshakes import in_handshake
from tcpupperd.host.sockets import stop_new_connections
from tcpupperd.serving.acceptor import Acceptor
from tcpupperd.serving.connection import NEW_CLIENT_TIME, Connection
from tcpupperd.serving.connections import Connections
from tcpupperd.serving.poller import Poller
from tcpupperd.words import counted

log = logging.getLogger(__name__)

#: Seconds allowed for handshakes in progress. They take one round trip unless a segment is lost,
#: which is retransmitted after one second and again two seconds later.
HANDSHAKE_TIME = 3.5

#: Seconds between two checks for handshakes in progress: no event reports that they are complete.
HANDSHAKE_TICK = 0.02

#: The number of times that a connection is answered before the server closes its side. Otherwise,
#: a client that never stops sending would delay the stop until `drain_timeout`.
LAST_ATTEMPTS = 64


class Drain:
    """Closes the connections of one server, step by step.

    A `gentle` drain waits for handshakes in progress, and for the first line of a client that has
    just connected.
    """

    def __init__(
        self,
        poller: Poller,
        acceptor: Acceptor,
        connections: Connections,
        *,
        timeout: float,
        gentle: bool = True,
    ) -> None:
        now = poller.now
        self._poller = poller
        self._acceptor = acceptor
        self._connections = connections
        self._give_up_at = now + timeout
        self._last_call_at = min(now + HANDSHAKE_TIME, self._give_up_at) if gentle else now
        new_client_time = NEW_CLIENT_TIME if gentle else 0.0
        self._answer = partial(Connection.drain_step, new_client_time=new_client_time)
        self._attempts_left: dict[Connection, int] = {}  # of those not closing yet
        self._wake = poller.at(math.inf)
        self._take(connections)
        for listener in acceptor.listeners:
            stop_new_connections(listener.socket)
        poller.each.append(self.step)
        self.step()

    def step(self) -> None:
        """Accept connections that still arrive, and close those that can be closed."""
        now = self._poller.now
        if self._acceptor.listeners:
            self._take_queues(now)
        for connection, attempts in list(self._attempts_left.items()):
            self._drain(connection, attempts, now)
        if now >= self._give_up_at:
            self._give_up()
        self._wake.set(self._when_next(now))

    def cancel(self) -> None:
        """Leave the rest to another drain."""
        self._poller.each.remove(self.step)
        self._wake.cancel()

    @property
    def unfinished(self) -> bool:
        """Whether clients may still connect or are still waiting for answers."""
        coming = self._acceptor.listeners or self._attempts_left
        return bool(coming) or any(one.unsent for one in self._connections)

    def _take(self, connections: Connections) -> None:
        for connection in connections:
            if connection.protocol.finished:
                self._connections.attempt(Connection.linger_briefly, connection)
            else:
                self._attempts_left.setdefault(connection, LAST_ATTEMPTS)

    def _take_queues(self, now: float) -> None:
        listeners = self._acceptor.listeners
        last = now >= self._last_call_at or not any(in_handshake(one.socket) for one in listeners)
        self._acceptor.take_queues()
        self._take(self._connections)
        if last:
            self._acceptor.stop()

    def _drain(self, connection: Connection, attempts: int, now: float) -> None:
        """Answer what one connection has received, unless it was already served in this loop
        iteration; without `attempts`, or if its protocol would take its time, close it."""
        was_served = connection.unsent or connection.last_activity == now
        takes_time = connection.protocol.proceeds_at is not None
        if connection in self._connections and (takes_time or not was_served):
            may_answer = attempts > 0 and not takes_time
            action = self._answer if may_answer else Connection.close_for_stop
            self._connections.attempt(action, connection)
        if connection not in self._connections or connection.protocol.finished:
            del self._attempts_left[connection]
        elif connection.last_activity == now:
            self._attempts_left[connection] = attempts - 1

    def _when_next(self, now: float) -> float:
        waiting = [one for one in self._attempts_left if not one.unsent]
        if any(one.last_activity == now for one in waiting):
            return now  # there may be more input
        soon = bool(self._acceptor.listeners or waiting)
        return min(now + HANDSHAKE_TICK if soon else math.inf, self._give_up_at)

    def _give_up(self) -> None:
        """Close or reset the connections that could not be drained in time."""
        self._give_up_at = math.inf
        if cut := sum(bool(one.unsent) for one in self._connections):
            log.warning(
                "drain_timeout expired, resetting %s with unsent answers",
                counted(cut, "connection"),
                extra=Event.ANSWERS_CUT_OFF.fields(),
            )
        for connection in self._connections:
            self._connections.attempt(Connection.abort, connection)
