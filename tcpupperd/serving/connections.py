"""All connections of a server: their places in the poller, their deadlines, their ends."""

from __future__ import annotations

import logging
import math
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator

from tcpupperd.address import source_of
from tcpupperd.host.descriptors import Sharing
from tcpupperd.serving.connection import Connection, Limits, Next
from tcpupperd.serving.counters import Tally
from tcpupperd.serving.deadlines import Deadlines
from tcpupperd.serving.poller import Poller

log = logging.getLogger(__name__)

#: SO_LINGER of socket(7), on, with no time. A client that comes to read after all must not take
#: the end of what it gets for the end of its answers; and the kernel would keep what it has queued
#: for many minutes.
RESET_AT_CLOSE = struct.pack("ii", True, 0)


class Connections:
    """The connections by their descriptors.

    Does what each says is to be done next. `hang_up` is called with the socket of one that has
    ended; `on_bug` with the socket and the address of one in which an unexpected exception was
    raised, which is the current one.
    """

    def __init__(
        self,
        poller: Poller,
        limits: Limits,
        tally: Tally,
        *,
        hang_up: Callable[[socket.socket], object],
        on_bug: Callable[[socket.socket, object], object],
    ) -> None:
        self._poller = poller
        self._tally = tally
        self._hang_up = hang_up
        self._on_bug = on_bug
        self._by_fd: dict[int, Connection] = {}
        self._sources: Counter[str] = Counter()
        self._deadlines = Deadlines()
        self.limits = limits
        self._counts_sources = limits.per_source < math.inf

    def __len__(self) -> int:
        return len(self._by_fd)

    def __iter__(self) -> Iterator[Connection]:
        """All of them; they may be closed meanwhile."""
        return iter(list(self._by_fd.values()))

    def __contains__(self, connection: Connection) -> bool:
        return self._by_fd.get(connection.fd) is connection

    def of(self, sock: socket.socket) -> Connection | None:
        """The connection that has a socket."""
        return self._by_fd.get(sock.fileno())

    def has_room_for(self, client_address: object) -> bool:
        """Whether the source of a client is below its limit."""
        if not self._counts_sources:
            return True
        return self._sources[source_of(client_address)] < self.limits.per_source

    # A turn

    def serve(self, ready: list[tuple[int, int]]) -> list[int]:
        """Handle those that are ready; returns the descriptors that are none of them."""
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
        """Have a connection do something else than `handle`."""
        try:
            following = action(connection, self._poller.now)
            if following is not None:
                self._do(connection, following)
        except Exception as error:
            self._failed(connection, error)

    def expire(self) -> None:
        """Give up those whose deadline has come."""
        while due := self._deadlines.due(self._poller.now):
            for fd in due:
                self.attempt(Connection.expire, self._by_fd[fd])

    @property
    def next_deadline(self) -> float:
        """When `expire` will have something to look at."""
        return self._deadlines.next()

    # Come and go

    def add(self, connection: Connection) -> None:
        """Serve a connection from now on. Raises OSError if it cannot be watched."""
        fd = connection.fd
        if fd in self._by_fd:  # its socket was closed behind our back
            self._forget(self._by_fd[fd])
        connection.last_activity = self._poller.now
        self._poller.watch(fd, connection.interest)
        self._by_fd[fd] = connection
        if self._counts_sources:
            self._count_source(connection, 1)
        if self.limits.shortest < math.inf:
            connection.tick = self._deadlines.add(fd, self._poller.now + self.limits.shortest)

    def remove(self, connection: Connection) -> None:
        """Serve it no more; its socket stays open."""
        self._poller.unwatch(connection.fd)
        self._forget(connection)

    def close(self, connection: Connection) -> None:
        """Serve it no more and close it; it may be closed already."""
        if self._by_fd.get(connection.fd) is connection:
            if Sharing.possible:
                self._poller.unwatch(connection.fd)
            self._forget(connection)
            self._hang_up(connection.socket)
            if self._tally.debug:
                log.debug("%s: closed after %d lines", connection, connection.protocol.lines)

    def cut(self, connection: Connection) -> None:
        """Close it in the midst of its answers, which are lost."""
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        self.close(connection)

    def _do(self, connection: Connection, following: Next) -> None:
        match following:
            case Next.CLOSE:
                self.close(connection)
            case Next.CUT:
                self.cut(connection)
            case Next.WATCH:
                self._poller.watch_for(connection.fd, connection.interest)
                self._schedule(connection)
            case Next.SCHEDULE:
                self._schedule(connection)

    def _failed(self, connection: Connection, error: Exception) -> None:
        if isinstance(error, OSError):
            connection.fail(error)
            self.close(connection)
            return
        try:
            self._on_bug(connection.socket, connection.client_address)
        finally:
            self.close(connection)

    def _forget(self, connection: Connection) -> None:
        del self._by_fd[connection.fd]
        self._deadlines.discard(connection.fd, connection.tick)
        if self._counts_sources:
            self._count_source(connection, -1)

    def _count_source(self, connection: Connection, change: int) -> None:
        source = source_of(connection.client_address)
        if source:
            self._sources[source] += change
            if not self._sources[source]:
                del self._sources[source]

    def _schedule(self, connection: Connection) -> None:
        """Look at the deadline of a connection when it can first have passed.

        No later than the shortest timeout from now: any deadline that arises later is at least
        that far ahead. So nothing needs to be done here when bytes move.
        """
        self._deadlines.discard(connection.fd, connection.tick)
        when = min(connection.deadline()[0], self._poller.now + self.limits.shortest)
        if when < math.inf:
            connection.tick = self._deadlines.add(connection.fd, when)
