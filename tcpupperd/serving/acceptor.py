"""Accepting connections from the queues of the listening sockets."""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import socket
from collections.abc import Callable, Iterable, Sized
from functools import partial

from tcpupperd.events import Event
from tcpupperd.host.messages import RateLimitedLog
from tcpupperd.host.sockets import BACKLOG, Listener
from tcpupperd.host.tcp_info import time_in_queue
from tcpupperd.serving.counters import (
    ACCEPT_PAUSES,
    ACCEPTED,
    ACCEPTED_FROM,
    LISTENERS,
    LONGEST_QUEUE,
    Tally,
)
from tcpupperd.serving.poller import Poller
from tcpupperd.serving.services import PRIVILEGED
from tcpupperd.words import counted

log = logging.getLogger(__name__)

#: Errors of accept(2) for a temporary shortage.
SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

#: Seconds without accepting after a shortage, unless a connection closes earlier.
SHORTAGE_PAUSE = 0.1

#: The number of connections accepted from a queue in one loop iteration. It is small, so that the
#: other workers get their share of a burst.
ACCEPTS_PER_ITERATION = 4

#: EPOLLEXCLUSIVE wakes one worker for a connection, always the first in the listener's wait queue,
#: so nearly all connections would go to one worker. After this many connections, a worker moves to
#: the end of the wait queue, which spreads them evenly.
ACCEPTS_BEFORE_REQUEUE = 16

#: Seconds between samples of how long connections wait to be accepted; each sample costs a
#: twentieth of accepting a connection.
TIMING_INTERVAL = 0.1

#: Connections of privileged services that are accepted beyond the capacity: someone trying to find
#: out why a worker is full must not have to wait until it no longer is.
PRIVILEGED_EXTRA = 8

LISTENING = select.EPOLLIN | select.EPOLLEXCLUSIVE

#: Called with each accepted connection, the address of its client and its listener.
AcceptCallback = Callable[[socket.socket, object, Listener], object]


class Acceptor:
    """All listeners of a server.

    They are polled only while the server has room: a full worker leaves new connections in the
    accept queue, for the other workers or until it has room again. A few more connections of
    privileged services are accepted even then.
    """

    def __init__(
        self,
        poller: Poller,
        listeners: Iterable[Listener],
        connections: Sized,
        welcome: AcceptCallback,
        tally: Tally,
    ) -> None:
        self.listeners = list(listeners)
        # The number of connections at which accepting stops; minus infinity before it begins.
        self.capacity = math.inf
        self._poller = poller
        self._connections = connections
        self._welcome = welcome
        self._tally = tally
        self._counters = {
            listener: ACCEPTED_FROM + min(listener.number, LISTENERS - 1)
            for listener in self.listeners
        }
        self._polled: set[Listener] = set()
        self._may_come = False, False  # clients; users of privileged services
        self._pause = poller.at(math.inf)  # pending during a pause
        self._open_at_pause = 0
        self._short = False  # whether there has been a shortage since a queue was last empty
        self._problem_logged = False  # whether this was logged
        self._may_log_at = 0.0
        self._may_time_at = 0.0
        poller.each.append(self.update_interest)

    def update_interest(self) -> None:
        """Poll the listeners while there is room for more connections, and only then."""
        connections = len(self._connections)
        if self._pause.pending and connections < self._open_at_pause:
            self._pause.cancel()  # a closed connection has freed its descriptor
        room = self.capacity - connections
        if self.listeners and -math.inf < room <= 0:
            self._log_problem("the limit set by max_connections or RLIMIT_NOFILE is reached")
        may_come = (False, False) if self._pause.pending else (room > 0, room > -PRIVILEGED_EXTRA)
        if may_come != self._may_come:
            self._may_come = may_come
            self._poll(*may_come)

    def accept_from_each(self) -> None:
        """Accept from each queue as one loop iteration would if all listeners were ready."""
        for listener in self.listeners:
            self._accept(listener)

    def take_queues(self) -> None:
        """Accept all waiting connections regardless of the limits, but no more from each queue
        than it holds, because new ones may keep arriving."""
        for listener in self.listeners:
            for _ in range(BACKLOG):
                if not self._accept_one(listener):
                    break

    def stop(self) -> None:
        """Stop accepting, and close this process's copies of the listeners."""
        self._poll(clients=False, privileged=False)
        for listener in self.listeners:
            listener.socket.close()
        self.listeners.clear()

    def _poll(self, clients: bool, privileged: bool) -> None:
        """Poll the listeners that may accept connections, and no others."""
        for listener in self.listeners:
            wanted = privileged if listener.name in PRIVILEGED else clients
            if wanted and listener not in self._polled:
                self._polled.add(listener)
                self._add(listener)
            elif not wanted and listener in self._polled:
                self._polled.remove(listener)
                self._poller.remove(listener.socket)

    def _add(self, listener: Listener) -> None:
        self._poller.add(listener.socket, partial(self._accept, listener), LISTENING)

    def _accept(self, listener: Listener) -> None:
        """Accept a few connections from a listener's queue."""
        capacity = self.capacity + PRIVILEGED_EXTRA * (listener.name in PRIVILEGED)
        room = min(ACCEPTS_PER_ITERATION, capacity - len(self._connections))
        while room > 0 and self._accept_one(listener):
            room -= 1

    def _accept_one(self, listener: Listener) -> bool:
        self._tally.ledger.accepting(listener.number)
        try:
            request, client_address = listener.accept()
        except BlockingIOError:
            if self._may_come[0]:  # otherwise the clients' queues, not being polled, may be full
                self._queue_seen_empty()
            return False
        except OSError as error:
            self._failed(error)
            return False
        numbers, counter = self._tally.numbers, self._counters[listener]
        numbers[PRIVILEGED.get(listener.name, ACCEPTED)] += 1
        numbers[counter] += 1
        if self._poller.now >= self._may_time_at:
            self._time(request)
        if numbers[counter] % ACCEPTS_BEFORE_REQUEUE == 0 and listener in self._polled:
            self._poller.remove(listener.socket)
            self._add(listener)
        self._welcome(request, client_address, listener)
        return True

    def _time(self, request: socket.socket) -> None:
        """Record how long a connection has waited. A sample is enough: it includes the first
        connection accepted after a pause, which has waited longest."""
        self._may_time_at = self._poller.now + TIMING_INTERVAL
        waited, numbers = int(time_in_queue(request) * 1_000_000), self._tally.numbers
        numbers[LONGEST_QUEUE] = max(waited, numbers[LONGEST_QUEUE])

    def _failed(self, error: OSError) -> None:
        """Pause after a shortage; any other error affects only that one connection."""
        if error.errno not in SHORTAGE:
            log.debug("a connection failed before it was accepted: %s", error)
            return
        self._begin_pause()
        self._log_problem(os.strerror(error.errno), ERRNO=error.errno)

    def _begin_pause(self) -> None:
        self._pause.set(self._poller.now + SHORTAGE_PAUSE)
        self._open_at_pause = len(self._connections)

    def _log_problem(self, why: str, **fields: object) -> None:
        """Count a shortage and log it immediately, but at a limited rate."""
        if not self._short:
            self._short = True
            self._tally.add(ACCEPT_PAUSES)
        if not self._problem_logged and self._poller.now >= self._may_log_at:
            self._problem_logged = True
            self._may_log_at = self._poller.now + RateLimitedLog.INTERVAL
            log.warning(
                "not accepting connections: %s; %s open, new ones wait in the accept queue",
                why,
                counted(len(self._connections), "connection"),
                extra=Event.ACCEPTING_PAUSED.fields(**fields),
            )

    def _queue_seen_empty(self) -> None:
        self._short = False
        if self._problem_logged:
            self._problem_logged = False
            log.warning("accepting connections again", extra=Event.ACCEPTING_RESUMED.fields())
