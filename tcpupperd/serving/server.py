"""A stream server that gives each connection an entry in one epoll.

Where `socketserver.ThreadingMixIn` gives a connection a thread, `UpperServer` gives it an
`UpperHandler` and an entry in the poll set. The extension points of `socketserver.BaseServer` keep
their meaning, and it is embedded like any server of that module::

    with UpperServer(("localhost", 0)) as server:
        threading.Thread(target=server.serve_forever).start()
        ...
        server.shutdown()
"""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import socketserver
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol

from tcpupperd.address import plain_host, source_of
from tcpupperd.config import Config
from tcpupperd.host import journal
from tcpupperd.host.sockets import listen_on
from tcpupperd.serving.acceptor import Acceptor
from tcpupperd.serving.counters import (
    BYTES,
    ERRORS,
    FIELDS,
    LINES,
    OPEN,
    REFUSED,
    RESET,
    WRITE_TIMEOUT,
)
from tcpupperd.serving.deadlines import Deadlines
from tcpupperd.serving.drain import Drain
from tcpupperd.serving.handler import UpperHandler
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol

log = logging.getLogger(__name__)

#: SO_LINGER of socket(7), on, with no time. A client that comes to read after all must not take
#: the end of what it gets for the end of its answers; and the kernel would keep what it has queued
#: for many minutes.
RESET_AT_CLOSE = struct.pack("ii", True, 0)


class Entry(Protocol):
    """What the poll set holds: a connection, a listener, a channel."""

    def handle(self) -> None:
        """Use the readiness of the descriptor."""


class UpperServer(socketserver.BaseServer):
    """Answers every line upper-cased, on any number of listening sockets.

    It serves until nothing can come any more: until `shutdown`, or until it has been told to
    `drain` and the last connection is gone. `now` is the time (CLOCK_MONOTONIC) at which this
    turn of the loop began; `counters` are numbered as in `scoreboard`.
    """

    def __init__(
        self,
        server_address: Any = None,
        RequestHandlerClass: type[UpperHandler] = UpperHandler,  # noqa: N803
        *,
        listeners: Sequence[socket.socket] = (),
        config: Config | None = None,
        counters: list[int] | memoryview | None = None,
    ) -> None:
        if server_address is not None:
            listeners = [*listeners, listen_on(server_address)]
        super().__init__(listeners[0].getsockname() if listeners else "", RequestHandlerClass)
        self.config = config or Config()
        self.counters = [0] * len(FIELDS) if counters is None else counters
        self.debug = log.isEnabledFor(logging.DEBUG)
        self.now = monotonic()
        self.open = 0  # connections
        self.capacity = self.config.max_connections  # open ones, with which accepting stops
        self.lines = 0  # answered
        self.bytes = 0  # sent
        self.draining: Drain | None = None
        self._sources: Counter[str] = Counter()
        self._refusals = journal.RateLimitedLog(log)
        self._deadlines = Deadlines()
        timeouts = self.config.idle_timeout, self.config.line_timeout, self.config.write_timeout
        self._shortest_timeout = min(filter(None, timeouts), default=math.inf)

        self._epoll = select.epoll()
        self._entries: dict[int, Entry] = {}
        self._waker = Waker()
        self.add_entry(self._waker, self._waker)
        self._stop_requested = False
        self._serving_thread: int | None = None
        self._stopped = threading.Event()
        self.acceptor = Acceptor(self, listeners)
        self.acceptor.arrange()

    # The face of socketserver.BaseServer

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve; `poll_interval` is accepted but not needed, because nothing polls."""
        self._stopped.clear()
        self._serving_thread = threading.get_ident()
        try:
            while not self._stop_requested and self.more_can_come():
                self.handle_request()
        finally:
            self._serving_thread = None
            self._stop_requested = False
            self._stopped.set()

    def handle_request(self) -> None:
        """One turn: wait, serve all that is ready, then see to what is due."""
        ready = self._epoll.poll(self.patience())
        self.now = monotonic()
        entries = self._entries
        for fd, _ in ready:
            entry = entries.get(fd)
            if entry is None:  # closed earlier in this turn
                continue
            try:
                entry.handle()
            except BlockingIOError:
                continue
            except Exception as error:
                self._failed(entry, error)
        self.service_actions()

    def shutdown(self) -> None:
        """End `serve_forever` now, from any thread, and wait until it has ended."""
        self._stop_requested = True
        self._waker.wake()
        if self._serving_thread not in (None, threading.get_ident()):
            self._stopped.wait()

    def server_close(self) -> None:
        """Answer what has been received, for up to `drain_timeout`, and close everything."""
        draining = self.drain()
        while draining.more_may_begin or any(one.unsent for one in self.connections()):
            self.handle_request()
        for handler in self.connections():
            self.close_connection(handler)
        self._waker.close()
        self._epoll.close()

    def fileno(self) -> int:
        """The epoll: readable when there is something to do."""
        return self._epoll.fileno()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether the source of a connection is below its limit."""
        limit = self.config.max_connections_per_source
        if not limit or self._sources[source_of(client_address)] < limit:
            return True
        host = plain_host(client_address[0])
        self._refusals.warn("%s has max_connections_per_source open, refused another", host)
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin to serve an accepted connection."""
        handler = self.new_handler(request, client_address)
        self.add_connection(handler)
        if self.debug:
            log.debug("%s: connected", handler.name)

    def shutdown_request(self, request: Any) -> None:
        """End a connection without losing answers that are on their way."""
        handler = self._entries.get(request.fileno())
        if isinstance(handler, UpperHandler):
            self.attempt(UpperHandler.end, handler)
        else:
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug met in serving one connection; the others are served on."""
        self.counters[ERRORS] += 1
        log.exception("bug in serving %s, closing the connection", client_address)

    def service_actions(self) -> None:
        """Once a turn: see to deadlines, and to accepting."""
        while due := self._deadlines.due(self.now):
            for fd in due:
                self.attempt(self._enforce_deadline, self._entries[fd])
        if self.draining:
            self.draining.go_on()
        self.acceptor.arrange()
        # Counted in plain attributes first: to add to a shared number takes three times as long.
        self.counters[OPEN] = self.open
        self.counters[LINES] = self.lines
        self.counters[BYTES] = self.bytes

    # The life of a connection

    def welcome(self, request: socket.socket, client_address: Any) -> None:
        """Serve a new connection, or end it if its source has too many."""
        try:
            if self.verify_request(request, client_address):
                self.process_request(request, client_address)
            else:
                self._refuse(request)
        except OSError as error:
            self.counters[RESET] += 1
            log.debug("%s: %s", client_address, error)
            self.shutdown_request(request)
        except Exception:
            self.handle_error(request, client_address)
            self.shutdown_request(request)

    def new_handler(self, request: socket.socket, client_address: Any) -> UpperHandler:
        """The handler of a connection, not served yet."""
        make: Callable[..., Any] = self.RequestHandlerClass
        handler: UpperHandler = make(request, client_address, self)
        return handler

    def new_protocol(self) -> LineProtocol | ChunkProtocol:
        """The protocol of a new connection."""
        config = self.config
        if config.framing == "none":
            return ChunkProtocol(config.lines_per_connection)
        return LineProtocol(config.max_line, config.lines_per_connection)

    def connections(self) -> list[UpperHandler]:
        """All that are being served."""
        return [entry for entry in self._entries.values() if isinstance(entry, UpperHandler)]

    def add_connection(self, handler: UpperHandler) -> None:
        """Serve a connection from now on."""
        self.add_entry(handler.request, handler, handler.interest)
        self.open += 1
        if self.config.max_connections_per_source:
            self._count_source(handler)
        if self._shortest_timeout < math.inf:
            fd = handler.request.fileno()
            handler.tick = self._deadlines.add(fd, self.now + self._shortest_timeout)

    def remove_connection(self, handler: UpperHandler) -> None:
        """Serve it no more; its socket stays open."""
        self._epoll.unregister(handler.request)
        self._forget(handler.request.fileno(), handler)

    def close_connection(self, handler: UpperHandler) -> None:
        """Serve it no more and close it; it may be closed already."""
        fd = handler.request.fileno()
        if fd in self._entries:
            self._forget(fd, handler)
            handler.finish()  # which takes it out of the epoll too
            self.acceptor.resume()
            if self.debug:
                log.debug("%s: closed after %d lines", handler.name, handler.protocol.lines)

    def cut_connection(self, handler: UpperHandler) -> None:
        """Close a connection in the midst of its answers, which are lost."""
        handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        self.close_connection(handler)

    def _forget(self, fd: int, handler: UpperHandler) -> None:
        del self._entries[fd]
        self._deadlines.discard(fd, handler.tick)
        self.open -= 1
        if handler.source:
            self._uncount_source(handler.source)

    def watch(self, handler: UpperHandler) -> None:
        """Wait for what the connection now needs."""
        self._epoll.modify(handler.request, handler.interest)

    def schedule(self, handler: UpperHandler) -> None:
        """Look at the deadline of a connection when it can first have passed.

        No later than the shortest timeout from now: any deadline that arises later is at least
        that far ahead. So nothing needs to be done here when bytes move.
        """
        fd = handler.request.fileno()
        self._deadlines.discard(fd, handler.tick)
        when = min(handler.deadline()[0], self.now + self._shortest_timeout)
        if when < math.inf:
            handler.tick = self._deadlines.add(fd, when)

    def drain(self, *, take_queues: bool = True) -> Drain:
        """Begin to accept no more, to answer what has been received, and to end all connections;
        `take_queues` as `Drain` has it."""
        self.now = monotonic()
        self.draining = Drain(self, take_queues=take_queues)
        self.draining.go_on()
        return self.draining

    def _refuse(self, request: socket.socket) -> None:
        """End a connection before it begins; its client reads end of file, not a reset.

        It is not kept until the client ends its side, too: it would take somebody else's place.
        """
        self.counters[REFUSED] += 1
        request.shutdown(socket.SHUT_WR)  # goes ahead of the reset, if input has come by now
        request.close()

    def _count_source(self, handler: UpperHandler) -> None:
        handler.source = source_of(handler.client_address)
        if handler.source:
            self._sources[handler.source] += 1

    def _uncount_source(self, source: str) -> None:
        self._sources[source] -= 1
        if not self._sources[source]:
            del self._sources[source]

    # The poll set

    def add_entry(self, file: HasFileno, entry: Entry, events: int = select.EPOLLIN) -> None:
        """Have `entry` called when one of the epoll events comes."""
        self._epoll.register(file, events)
        self._entries[file.fileno()] = entry

    def remove_entry(self, file: HasFileno) -> None:
        """The opposite of `add_entry`; to be called before the file is closed."""
        del self._entries[file.fileno()]
        self._epoll.unregister(file)

    def more_can_come(self) -> bool:
        """Whether there is anything left that can bring work."""
        return bool(self.acceptor.listeners or self.open)

    def patience(self) -> float | None:
        """Seconds to wait at the most until something is due; None is for ever."""
        when = min(self._deadlines.next(), self.acceptor.resumes_at or math.inf)
        if self.draining:
            when = min(when, self.draining.next_look)
        return None if when == math.inf else max(0.0, when - monotonic())

    def _enforce_deadline(self, handler: UpperHandler) -> None:
        when, reason = handler.deadline()
        if when > self.now:
            self.schedule(handler)
            return
        if reason is None and handler.linger_on():
            return
        if reason is not None:
            self.counters[reason] += 1
            log.debug("%s: %s", handler.name, FIELDS[reason])
        if reason == WRITE_TIMEOUT:
            self.cut_connection(handler)
        elif reason is None:
            self.close_connection(handler)
        else:
            handler.end()

    def attempt(self, action: Callable[[UpperHandler], None], handler: Any) -> None:
        """Do something that may find, outside `handle`, that the client is gone."""
        try:
            action(handler)
        except Exception as error:
            self._failed(handler, error)

    def _failed(self, entry: Entry, error: Exception) -> None:
        if not isinstance(entry, UpperHandler):
            raise error
        if isinstance(error, OSError):
            self.counters[RESET] += 1
            log.debug("%s: %s", entry.name, error)
        else:
            self.handle_error(entry.request, entry.client_address)
        self.close_connection(entry)


class Call(NamedTuple):
    """An entry that is one function."""

    handle: Callable[[], None]


class HasFileno(Protocol):
    """A socket or the like."""

    def fileno(self) -> int: ...


class Waker:
    """Ends the wait of a server from another thread."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._fd

    def wake(self) -> None:
        """End the wait; from any thread."""
        os.eventfd_write(self._fd, 1)

    def handle(self) -> None:
        """Forget the wake-up."""
        os.eventfd_read(self._fd)

    def close(self) -> None:
        """Release the descriptor."""
        os.close(self._fd)
