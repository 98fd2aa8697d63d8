"""A stream server that serves all connections from one epoll instance.

While `socketserver.ThreadingMixIn` starts a thread for each connection, `UpperServer` creates a
`Connection` and adds it to the poller. The extension points of `socketserver.BaseServer` keep
their meaning, and the server is embedded like any other `socketserver` server::

    with UpperServer(("localhost", 0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ...
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import socketserver
from collections.abc import MutableSequence, Sequence
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

from outlive.descriptors import Sharing
from tcpupperd.address import connectable
from tcpupperd.config import Config
from tcpupperd.host.sockets import BACKLOG, Listener, listen_on
from tcpupperd.serving.acceptor import Acceptor
from tcpupperd.serving.connection import Connection, Limits
from tcpupperd.serving.connection_log import ConnectionLog
from tcpupperd.serving.connections import Callbacks, Connections
from tcpupperd.serving.counters import BUG, RESET, SOURCE_LIMIT, Tally, reason
from tcpupperd.serving.drain import Drain
from tcpupperd.serving.handlers import HANDLERS, framing_of
from tcpupperd.serving.poller import Poller
from tcpupperd.serving.report import Report, report_of_single_server
from tcpupperd.serving.run import Run
from tcpupperd.serving.services import Service, services
from tcpupperd.words import written

log = logging.getLogger(__name__)


class UpperServer(socketserver.BaseServer):
    """Answers every line in upper case, on any number of listeners.

    `RequestHandlerClass` is `UpperHandler` or `ChunkHandler`; the default depends on the
    configured framing. The server runs until `shutdown` or, after `drain`, until the last
    connection has ended.
    """

    request_queue_size = BACKLOG
    allow_reuse_address = True
    instance = "tcpupperd"  # the name of the configuration, for `greeting`

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if issubclass(cls, (socketserver.ThreadingMixIn, socketserver.ForkingMixIn)):
            raise TypeError(
                f"{cls.__name__}: UpperServer cannot be combined with ThreadingMixIn or"
                " ForkingMixIn; remove the mix-in, or use it with socketserver.TCPServer"
            )

    def __init__(
        self,
        server_address: Any = None,
        RequestHandlerClass: type[socketserver.BaseRequestHandler] | None = None,  # noqa: N803
        *,
        listeners: Sequence[Listener] = (),
        config: Config | None = None,
        counters: MutableSequence[int] | memoryview | None = None,
    ) -> None:
        self.config = config or Config()
        if RequestHandlerClass:
            self.config = self.config.replace(framing=framing_of(RequestHandlerClass))
        self._bound_here = not listeners
        if server_address is not None:
            listeners = [*listeners, self._bind(server_address)]
        self.socket = listeners[0].socket if listeners else None
        address = connectable(self.socket.getsockname()) if self.socket else ""
        super().__init__(address, HANDLERS[self.config.framing])
        self.tally = Tally(counters, debug=log.isEnabledFor(logging.DEBUG))
        self.poller = Poller()
        self._connection_log = ConnectionLog(self.config.worker_count, self.poller)
        self._on_end = self._connection_log.ended if self._is_logged() else None
        limits = Limits.of(self.config)
        callbacks = Callbacks(self.shutdown_request, self.handle_error, self._on_end)
        self.connections = Connections(self.poller, limits, self.tally, callbacks)
        self.prepare(listeners)
        self.acceptor = Acceptor(
            self.poller, listeners, self.connections, self.welcome, self.tally
        )
        self.acceptor.capacity = self.config.max_connections
        self.draining: Drain | None = None
        self.services = services(self, listeners)
        self._upper = self.services["upper"]
        # The services of accepted connections that are not served yet: a hook may postpone
        # `finish_request`. Those with `upper` are left out.
        self._service_of: WeakKeyDictionary[socket.socket, Service] = WeakKeyDictionary()
        self._run = Run(self.poller.wake)
        self._closed = False
        self.acceptor.update_interest()

    def _bind(self, address: Any) -> Listener:
        backlog, reuse = self.request_queue_size, self.allow_reuse_address
        return Listener(listen_on(address, backlog=backlog, reuse=reuse))

    def _is_logged(self) -> bool:
        """Whether to log each connection that ended."""
        return self.config.log_connections and log.isEnabledFor(logging.INFO)

    def prepare(self, listeners: Sequence[Listener]) -> None:
        """Number the listeners, and set their options, which their connections inherit."""
        for number, listener in enumerate(listeners):
            listener.number = number
            listener.set_options(self.config.keepalive)

    # Serving

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve. `poll_interval` is accepted but ignored: no flag is polled."""
        with self._run.begin():
            try:
                while not self._run.stop_requested and self.more_can_come():
                    self.run_once()
            finally:
                self._connection_log.log_summary()

    def handle_request(self) -> None:
        """Run one loop iteration: wait, serve what is ready, and handle what is due. With a
        `timeout`, call `handle_timeout` if nothing becomes ready within that many seconds."""
        self._run.process = os.getpid()
        give_up_at = math.inf if self.timeout is None else monotonic() + self.timeout
        while not self.run_once(give_up_at - monotonic()):
            if self.poller.now >= give_up_at:
                self.handle_timeout()
                return

    def run_once(self, at_most: float = math.inf) -> bool:
        """Run one loop iteration, which waits `at_most` seconds; return whether any descriptor was
        ready."""
        ready = self.poller.wait(at_most)
        for fd in self.connections.serve(ready):
            self.poller.dispatch(fd)
        self.poller.finish()
        self.service_actions()
        self.tally.publish(len(self.connections), monotonic() - self.poller.now)
        return bool(ready)

    def more_can_come(self) -> bool:
        """Whether there is a listener or a connection left."""
        return bool(self.acceptor.listeners or self.connections)

    # Stopping

    def is_stopping_soon(self) -> bool:
        """Whether new clients should go to another server, because this one is about to stop."""
        return self.draining is not None

    def report(self) -> Report:
        """The state of this server, for the service `metrics`."""
        limit = int(self.acceptor.capacity)
        listeners, leaving = self.acceptor.listeners, self.is_stopping_soon()
        return report_of_single_server(self.tally.numbers, listeners, limit=limit, leaving=leaving)

    def drain(self, *, take_queues: bool = True, gentle: bool = True) -> Drain:
        """Stop accepting, answer what has been received, and close all connections.

        With `take_queues`, connections that wait in the accept queues are served first; omit it if
        another process has the same listeners and accepts them. For `gentle`, see `Drain`.
        """
        self.poller.update_clock()
        if self.draining:
            self.draining.cancel()
        if not take_queues:
            self.acceptor.stop()
        timeout = self.config.drain_timeout
        self.draining = Drain(
            self.poller, self.acceptor, self.connections, timeout=timeout, gentle=gentle
        )
        return self.draining

    def shutdown(self) -> None:
        """Stop `serve_forever`, and wait until it has returned. May be called from any thread or
        signal handler. In a process forked from the one that serves, this does nothing."""
        self._run.stop()

    def server_close(self) -> None:
        """Stop `serve_forever`, answer what has been received, for up to `drain_timeout` seconds,
        and close everything. A second call does nothing.

        If a process was forked since the server was created, only the one that serves does this;
        the other one only closes its copies of the descriptors.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._run.is_shared and self._run.process != os.getpid():
                self._close_copies()
            else:
                self._end_all()
        finally:
            self.poller.close()

    def _close_copies(self) -> None:
        """Close the descriptors of this process, and leave the sockets and the epoll, which belong
        to the other process too, as they are."""
        for listener in self.acceptor.listeners:
            listener.socket.close()
        for connection in self.connections:
            connection.socket.close()

    def _end_all(self) -> None:
        self.shutdown()
        if not self._bound_here or self._run.is_shared:  # another process may accept there too
            self.acceptor.take_queues()
            self.acceptor.stop()
        draining = self.drain(gentle=False)
        while draining.unfinished:
            self.run_once()
        for connection in self.connections:
            self.connections.close(connection)

    def fileno(self) -> int:
        """The epoll descriptor, which is readable when there is something to do."""
        return self.poller.fileno()

    # The stages of a request, as in `socketserver.BaseServer`

    def welcome(
        self, request: socket.socket, client_address: Any, listener: Listener | None = None
    ) -> None:
        """Serve a new connection, or close it if its service does not admit the client."""
        service = self.services[listener.name] if listener else self._upper
        if service is not self._upper:
            self._service_of[request] = service
        try:
            refusal = service.refusal(request, client_address)
            if refusal is None:
                self.process_request(request, client_address)
            else:
                self._refuse(request, client_address, refusal)
        except OSError as error:
            self.tally.add(RESET)
            log.debug("%s: %s", client_address, error)
            self.shutdown_request(request)
        except Exception:
            self.handle_error(request, client_address)
            self.shutdown_request(request)

    def refusal(self, request: socket.socket, client_address: Any) -> int | None:
        """The counter of the clients that `verify_request` refuses, which has counted this one;
        None if it is accepted."""
        if self.verify_request(request, client_address):
            return None
        self.tally.add(SOURCE_LIMIT)
        return SOURCE_LIMIT

    def _refuse(self, request: socket.socket, client_address: Any, counter: int) -> None:
        """Close a connection before it is served; its client reads end of file, not a reset. This
        does not linger until the client closes its side: that would take up the place of another
        client."""
        if self._on_end:
            service = self._service_of.pop(request, self._upper)
            refused = self.new_connection(request, client_address, service)
            refused.began, refused.reason = self.poller.now, reason(counter)
            self._on_end(refused, self.poller.now)
        with contextlib.suppress(OSError):  # the client has already disconnected
            request.shutdown(socket.SHUT_WR)  # precedes the reset that unread input would cause
        self.shutdown_request(request)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether the source of a connection is below its limit."""
        return self.connections.sources.admit(client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start serving an accepted connection; `shutdown_request` is called when it ends."""
        self.finish_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Add a connection to those being served. No handler is created: the connection does what
        `RequestHandlerClass` would do."""
        service = self._service_of.pop(request, self._upper)
        connection = self.new_connection(request, client_address, service)
        self.connections.add(connection)
        self.tally.ledger.add(connection)
        if self.tally.debug:
            log.debug("%s: connected", written(client_address))
        if connection.protocol.opening:
            self.connections.attempt(Connection.open, connection)

    def new_connection(
        self, request: socket.socket, client_address: Any, service: Service
    ) -> Connection:
        """Create a connection, without serving it yet."""
        protocol, limits = service.protocol(client_address), self.connections.limits
        return Connection(request, client_address, protocol, limits, self.tally)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection without losing answers in flight. As in `socketserver`, this is both
        what ends a request and what is called when it has ended: the first call for a connection
        that is being served half-closes it, and the call after its end closes the socket through
        `close_request`."""
        connection = self.connections.of(request)
        if connection:
            self.connections.attempt(Connection.close_gracefully, connection)
            return
        if Sharing.possible:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Close the socket of a connection that has ended."""
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug that affects one connection; the others continue to be served."""
        self.tally.add(BUG)
        log.exception("bug while serving %s; closing the connection", client_address)
