"""Taking connections from the queues of the listening sockets."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tcpupperd.host import journal
from tcpupperd.host.sockets import in_handshake, refuse
from tcpupperd.serving.counters import ACCEPTED, SHORTAGES

if TYPE_CHECKING:
    from tcpupperd.serving.server import UpperServer

log = logging.getLogger(__name__)

#: accept(2) fails with these for want of something that comes back.
SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

#: Seconds without accepting after a shortage, unless a connection closes earlier.
SHORTAGE_PAUSE = 0.1

#: Connections taken from a queue in one turn. Few, so that of many that come at once the other
#: workers get their share.
ACCEPTS_PER_TURN = 4

#: EPOLLEXCLUSIVE wakes one worker for a connection, and always the first in the listener's wait
#: queue: nearly all connections would go to one worker. Each goes to the end of the queue after
#: this many, which spreads them evenly.
ACCEPTS_BEFORE_REQUEUE = 16

#: Bytes that the kernel takes for a connection beyond what is on its way. Without, it takes up to
#: 4 MiB, and says that it takes more only when a third is gone: a client that reads slowly but all
#: the time would seem to have stopped.
UNSENT_MAX = 131072

LISTENING = select.EPOLLIN | select.EPOLLEXCLUSIVE


class Acceptor:
    """All listening sockets of a server.

    They are in its poll set only while it has room: a worker that can take no more leaves the
    connections in the kernel's queue, to the other workers or until it has room again.
    """

    def __init__(self, server: UpperServer, sockets: Iterable[socket.socket]) -> None:
        self._server = server
        self.listeners = [Listener(self, listening) for listening in sockets]
        self._polled = False
        self._paused_until = 0.0
        self._short = False  # of anything that it takes, since a queue was last seen empty
        self._complained = False  # of this, in the log
        self._may_complain_at = 0.0

    def arrange(self) -> None:
        """Have the listeners polled if there is room, and only then."""
        server = self._server
        if self._paused_until <= server.now:
            self._paused_until = 0.0
        room = server.open < server.capacity
        if self.listeners and not room:
            self._complain("no more are allowed by max_connections and RLIMIT_NOFILE")
        wanted = room and not self._paused_until
        if wanted != self._polled:
            self._polled = wanted
            for listener in self.listeners:
                if wanted:
                    server.add_entry(listener.socket, listener, LISTENING)
                else:
                    server.remove_entry(listener.socket)

    @property
    def resumes_at(self) -> float:
        """When a pause ends that no event will end; 0 if there is none."""
        return self._paused_until

    def resume(self) -> None:
        """A descriptor has come free."""
        self._paused_until = 0.0

    def accept(self, listener: Listener) -> None:
        """Take a few connections from a listener's queue."""
        room = self._server.capacity - self._server.open
        for _ in range(min(room, ACCEPTS_PER_TURN)):
            if not self._accept_one(listener):
                return

    def refuse(self) -> None:
        """Begin no new connections."""
        for listener in self.listeners:
            refuse(listener.socket)

    @property
    def expects_more(self) -> bool:
        """Whether connections will come although no new ones begin."""
        return any(in_handshake(listener.socket) for listener in self.listeners)

    def take_queues(self) -> None:
        """Take all connections that are waiting, whatever the limits say."""
        for listener in self.listeners:
            while self._accept_one(listener):
                pass

    def stop(self) -> None:
        """Accept no more; closes this process's copies of the listeners."""
        for listener in self.listeners:
            if self._polled:
                self._server.remove_entry(listener.socket)
            listener.socket.close()
        self.listeners.clear()

    def _accept_one(self, listener: Listener) -> bool:
        try:
            request, client_address = listener.accept()
        except BlockingIOError:
            self._queue_seen_empty()
            return False
        except OSError as error:
            self._failed(error)
            return False
        self._server.counters[ACCEPTED] += 1
        listener.accepted += 1
        if listener.accepted % ACCEPTS_BEFORE_REQUEUE == 0 and self._polled:
            self._server.remove_entry(listener.socket)
            self._server.add_entry(listener.socket, listener, LISTENING)
        self._server.welcome(request, client_address)
        return True

    def _failed(self, error: OSError) -> None:
        """Pause on a shortage; anything else was the failure of that one connection."""
        if error.errno not in SHORTAGE:
            log.debug("a connection failed before it was accepted: %s", error)
            return
        self._paused_until = self._server.now + SHORTAGE_PAUSE
        self._complain(os.strerror(error.errno))

    def _complain(self, why: str) -> None:
        """Count a shortage, and log it: not too often, but before it has lasted long."""
        if not self._short:
            self._short = True
            self._server.counters[SHORTAGES] += 1
        if not self._complained and self._server.now >= self._may_complain_at:
            self._complained = True
            self._may_complain_at = self._server.now + journal.RateLimitedLog.INTERVAL
            log.warning(
                "cannot accept: %s; %d connections are open, new ones wait in the kernel's queue",
                why,
                self._server.open,
            )

    def _queue_seen_empty(self) -> None:
        self._short = False
        if self._complained:
            self._complained = False
            log.warning("accepting again")


class Listener:
    """A listening socket in the poll set."""

    def __init__(self, acceptor: Acceptor, listening: socket.socket) -> None:
        # A client can be gone between epoll and accept(2), or another worker be faster.
        listening.setblocking(False)
        if listening.family != socket.AF_UNIX:
            # Connections inherit both: no answer waits for the acknowledgement of the one before,
            # and no more are queued for a client that does not read.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_MAX)
        self._acceptor = acceptor
        self._kind = int(listening.family), int(listening.type), listening.proto
        self.socket = listening
        self.accepted = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """A connection and its client's address, as `socket.socket.accept` returns them.

        That function first makes enumeration members of the listener's family and type, each time
        again: a third of its 3.2 microseconds, where a whole connection takes 18.
        """
        fd, client_address = self.socket._accept()  # type: ignore[attr-defined]
        return socket.socket(*self._kind, fileno=fd), client_address

    def handle(self) -> None:
        """Accept."""
        self._acceptor.accept(self)
