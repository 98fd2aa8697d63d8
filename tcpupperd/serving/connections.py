"""All connections of a server: polling, deadlines, closing."""

from __future__ import annotations

import logging
import math
import select
import socket
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from outlive.descriptors import Sharing
from tcpupperd.serving.connection import Connection, Limits, Next, Timeout
from tcpupperd.serving.counters import BUG, Tally, reason
from tcpupperd.serving.deadlines import Deadlines
from tcpupperd.serving.poller import Poller
from tcpupperd.serving.sources import Sources
from tcpupperd.words import counted

log = logging.getLogger(__name__)

#: SO_LINGER (see socket(7)), enabled with a time of zero. A client that resumes reading must not
#: mistake a truncated answer for a complete one; besides, without this, the kernel would keep the
#: queued data for many minutes.
RESET_AT_CLOSE = struct.pack("ii", True, 0)

#: The default: what is queued is sent after the close.
NO_LINGER = struct.pack("ii", False, 0)


class Callbacks(NamedTuple):
    """Callbacks to the owner of the connections."""

    hang_up: Callable[[socket.socket], object]
    """Called with the socket of a connection that has ended."""

    on_bug: Callable[[socket.socket, object], object]
    """Called with the socket and the client's address while an unexpected exception from a
    connection is being handled."""

    ended: Callable[[Connection, float], object] | None = None
    """Called with a connection that has ended and the time, while its socket is still open."""


class Connections:
    """The connections, by descriptor.

    It carries out what each connection requests next.
    """

    def __init__(
        self,
        poller: Poller,
        limits: Limits,
        tally: Tally,
        callbacks: Callbacks,
    ) -> None:
        self._poller = poller
        self._tally = tally
        self._callbacks = callbacks
        self._by_fd: dict[int, Connection] = {}
        self._deadlines = Deadlines()
        self._expiry = poller.at(math.inf, self.expire)
        self.limits = limits
        self.sources = Sources(limits.per_source)

    def __len__(self) -> int:
        return len(self._by_fd)

    def __iter__(self) -> Iterator[Connection]:
        """All connections, which may be closed during the iteration."""
        return iter(list(self._by_fd.values()))

    def __contains__(self, connection: Connection) -> bool:
        return self._by_fd.get(connection.fd) is connection

    def of(self, sock: socket.socket) -> Connection | None:
        """The connection with this socket."""
        return self._by_fd.get(sock.fileno())

    # A loop iteration

    def serve(self, ready: list[tuple[int, int]]) -> list[int]:
        """Handle the connections that are ready; return the other descriptors."""
        by_fd, now = self._by_fd, self._poller.now
        others = []
        for fd, _ in ready:
            connection = by_fd.get(fd)
            if connection is None:
                others.append(fd)
                continue
            try:
                following = connection.handle(now)
            except BlockingIOError:
                continue
            except Exception as error:
                self._failed(connection, error)
                continue
            if following is not None:
                self._do(connection, following)
        return others

    def attempt(
        self, action: Callable[[Connection, float], Next | None], connection: Connection
    ) -> None:
        """Run an action of a connection other than `handle`."""
        try:
            following = action(connection, self._poller.now)
            if following is not None:
                self._do(connection, following)
        except Exception as error:
            self._failed(connection, error)

    def expire(self) -> None:
        """Handle connections whose deadline has passed. If there are many, the rest is due in the
        next loop iteration, so that those that are ready do not have to wait."""
        for fd in self._deadlines.pop_due(self._poller.now):
            if connection := self._by_fd.get(fd):  # else a hook has closed it meanwhile
                self.attempt(Connection.expire, connection)
        self._expiry.set(self._deadlines.next_tick())

    # Adding and removing

    def add(self, connection: Connection) -> None:
        """Start serving a connection. Raises OSError if it cannot be polled."""
        fd = connection.fd
        if fd in self._by_fd:  # the old connection's socket was closed elsewhere
            self._forget(self._by_fd[fd])
        connection.began = connection.last_activity = self._poller.now
        self._poller.watch(fd, select.EPOLLIN)
        self._by_fd[fd] = connection
        self._tally.privileged += connection.protocol.is_privileged
        if self.sources.limited and not connection.protocol.identifies_client:
            self.sources.count(connection.client_address)
        if self.limits.shortest < math.inf:
            self._hold(connection, self._poller.now + self.limits.shortest)

    def remove(self, connection: Connection) -> None:
        """Stop serving a connection; its socket stays open."""
        self._poller.unwatch(connection.fd)
        self._forget(connection)

    def close(self, connection: Connection) -> None:
        """Stop serving a connection and close it; it may already be closed."""
        if self._by_fd.get(connection.fd) is connection:
            if Sharing.possible:
                self._poller.unwatch(connection.fd)
            self._forget(connection)
            if self._callbacks.ended:
                self._callbacks.ended(connection, self._poller.now)
            try:
                self._callbacks.hang_up(connection.socket)
            except Exception:
                self._callbacks.on_bug(connection.socket, connection.client_address)
            if connection.fd not in self._by_fd:  # it is closed by now
                self._tally.ledger.forget(connection.fd)
            if self._tally.debug:
                lines = counted(connection.protocol.lines, "line")
                log.debug("%s: closed after %s", connection, lines)

    def reset(self, connection: Connection) -> None:
        """Reset a connection; unsent answers are lost."""
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        self.close(connection)

    def _do(self, connection: Connection, following: Next) -> None:
        if connection not in self:  # a hook has closed it
            return
        match following:
            case Next.CLOSE:
                self.close(connection)
            case Next.RESET:
                self.reset(connection)
            case Next.WATCH:
                self._poller.watch_for(connection.fd, connection.interest)
                self._schedule(connection)
            case Next.SCHEDULE:
                self._schedule(connection)

    def _failed(self, connection: Connection, error: Exception) -> None:
        if isinstance(error, OSError):
            connection.record_error(error)
            self.close(connection)
            return
        connection.reason = reason(BUG)
        try:
            self._callbacks.on_bug(connection.socket, connection.client_address)
        finally:
            self.close(connection)

    def _forget(self, connection: Connection) -> None:
        del self._by_fd[connection.fd]
        self._tally.privileged -= connection.protocol.is_privileged
        if connection.bucket is not None:
            connection.bucket.discard(connection.fd)
        if self.sources.limited and not connection.protocol.identifies_client:
            self.sources.count(connection.client_address, -1)

    def _schedule(self, connection: Connection) -> None:
        """Check the deadline of a connection at the earliest time at which it can have passed.

        This is no later than the shortest timeout from now, because any new deadline is at least
        that far ahead. Nothing therefore needs to be updated when data is received or sent.
        """
        if connection.bucket is not None:
            connection.bucket.discard(connection.fd)
        deadline, timeout = connection.deadline()
        when = min(deadline, self._poller.now + self.limits.shortest)
        if when < math.inf:
            is_exact = timeout is Timeout.PROCEED
            self._hold(connection, when, Deadlines.FINE_TICK if is_exact else Deadlines.TICK)

    def _hold(self, connection: Connection, when: float, tick: float = Deadlines.TICK) -> None:
        """Check the deadline of a connection at this time."""
        connection.bucket = self._deadlines.add(connection.fd, when, tick)
        if when <= self._expiry.when - tick:  # otherwise `expire` comes in time
            self._expiry.set(self._deadlines.next_tick())
