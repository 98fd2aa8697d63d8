"""Keep the connections of an asyncio service open across restarts.

    async def handle(reader, writer):
        number = int(writer.state or 0)
        while line := await reader.readline():
            number += 1
            writer.write(b"%d %s" % (number, line))
            writer.state = b"%d" % number
            await writer.drain()

    asyncio.run(serve(Service("counter"), handle))

`handle` is a coroutine function as for asyncio.start_server, with streams of the same kind. The
connection is closed when it returns. What is new is `writer.state`: bytes that are handed over
with the connection, for what `handle` knows about it. For callbacks instead of streams, there is
`serve_protocol`.

**Where a restart interrupts a handler.** Only while it waits in a method of `reader`: there, it
has answered all that it has read. The next process calls its own `handle` with the same socket.
What the reader had received and not yet given out is handed over too, and so is what the writer
had not yet sent. A handler that waits for anything else, such as a database, continues until it
reads again. If it does not do so within `grace` seconds, its connection is closed. All others
wait meanwhile, so `grace` is also the longest time for which a single handler can delay a restart.

- *State and answer belong together.* Set `writer.state` and call `writer.write` without awaiting
  in between.
- *A request that is read in several calls* is read again as a whole by the next process if the
  calls are in `with reader.atomic():`. Without it, a restart between them loses the first part.
- *A handler that waits for something other than its client*, such as a queue, says where nothing
  is lost if it is interrupted: `with writer.idle(): item = await queue.get()`.
- *If several tasks use a connection*, it is handed over once all of them wait in `reader` or are
  idle.
- *Cancellation.* The interrupted task is cancelled after its connection has been taken from it:
  whatever it still writes goes nowhere. A handler that announces the end of a connection in a
  `finally` clause checks `writer.handed_over` first.
- *Backpressure.* While a restart waits for handlers, `drain` does not wait for slow clients: up to
  4 MiB are added to the unsent answers of each connection, all of which are handed over. Beyond
  that, it waits; if it still waits after `grace` seconds, the connection is closed. A handler that
  sends continuously and does not read should wait in `with writer.idle(): await writer.drain()`,
  where a restart may interrupt it.
- *A stop* is no restart: all that has arrived is still answered. The handler then reads the end of
  the input, as if the client had closed its side, and has `grace` seconds to return.
- *TLS* cannot be handed over, because its state is inside OpenSSL. Let a proxy in front terminate
  it; `writer.start_tls` is refused.

Only the public interfaces of asyncio are used, so other event loops, such as uvloop, work too.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from typing import Any, NamedTuple, NoReturn, Protocol, Self, TypeAlias, cast
from weakref import WeakKeyDictionary

from outlive.items import Client, Item
from outlive.service import Order, Service
from outlive.words import counted

__all__ = ["KeptProtocol", "Reader", "Writer", "serve", "serve_protocol"]

log = logging.getLogger(__name__)

#: Connections that are taken from their transports before those close them: each needs a second
#: descriptor until then, and `Service` keeps 32 free.
CHUNK = 16

#: Seconds between two checks whether the handlers that are still at work have finished.
INTERVAL = 0.01

#: Bytes of unsent answers that may be added during a restart before `drain` waits for the client.
UNSENT_MAX = 2**22

#: Bytes that are read from a connection when the service is stopped: more than a socket buffers.
ARRIVED_MAX = 2**24

Data: TypeAlias = bytes | bytearray | memoryview
Handler: TypeAlias = Callable[["Reader", "Writer"], Awaitable[object]]


class KeptProtocol(Protocol):
    """What `serve_protocol` needs besides the methods of an asyncio protocol."""

    def connection_made(self, transport: Any, /) -> None: ...

    def state(self) -> bytes | None:
        """What the next process needs to continue, including data that has been received but not
        handled; None while the protocol is busy, for example with an answer. It is asked again
        then, for up to `grace` seconds."""


async def serve(
    service: Service,
    handle: Handler,
    *,
    reload: Callable[[], object] = lambda: None,
    limit: int = 2**16,
    grace: float = 10,
) -> None:
    """Serve clients with streams until the service is stopped or restarted, and return then.

    `reload` is called to read the settings again, and may be a coroutine function; `limit` is that
    of asyncio.start_server, and `grace` is in seconds.
    """
    await _serve(
        service, lambda server, client: _Streams(server, client, handle, limit), reload, grace
    )


async def serve_protocol(
    service: Service,
    factory: Callable[[Client], KeptProtocol],
    *,
    reload: Callable[[], object] = lambda: None,
    grace: float = 10,
) -> None:
    """The same with an asyncio protocol for each client, which `factory` makes.

    `client.state` is what `state` of the protocol returned in the previous process. A protocol
    that is busy when an order comes receives what it needs to finish. After `state` has returned
    bytes, it receives no more data, and finally `connection_lost(None)`: what its client has sent
    meanwhile is what the protocol in the next process receives first.
    """
    await _serve(
        service, lambda server, client: _Callbacks(server, client, factory), reload, grace
    )


class Tail:
    """The bytes written last to a transport, as far as they may be unsent: a transport can tell
    how many bytes are unsent, but not which. They are always the last ones."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._size = 0
        self._check_at = 0  # counting what is unsent takes time if it is much

    def wrote(self, data: Data, count_unsent: Callable[[], int]) -> None:
        """Remember what has just been written."""
        self._parts.append(bytes(data))
        self._size += len(data)
        if self._size >= self._check_at:
            self.trim(count_unsent())

    def trim(self, unsent: int) -> None:
        """Forget all but that many bytes, and what was written together with them."""
        while self._parts and self._size - len(self._parts[0]) >= unsent:
            self._size -= len(self._parts.popleft())
        self._check_at = 2 * unsent

    def last(self, unsent: int) -> bytes:
        """That many bytes from the end."""
        return b"".join(self._parts)[-unsent:] if unsent else b""


class Phase(Enum):
    """What has become of the connection of a transport."""

    OPEN = auto()
    LEAVING = auto()  #: an order has come; what is unsent is handed over
    SETTLED = auto()  #: nothing that the protocol still does has an effect


class Transport:
    """The transport that protocols and streams are given. It behaves like that of the loop, but it
    knows which bytes are unsent, and the connection can be taken away from it."""

    def __init__(self, transport: asyncio.Transport, link: _Link) -> None:
        self._transport = transport
        self._link = link
        self._tail = Tail()
        self._phase = Phase.OPEN
        self._flags = self._unsent_max = 0
        self._unsent: bytes | None = b""  # when the connection was taken; None: not known yet

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asyncio must not find what it could not use, as for TLS
            raise AttributeError(name)
        return getattr(self._transport, name)

    def write(self, data: Data) -> None:
        if self._phase is Phase.SETTLED:  # from a handler that still has something to say
            return
        self._transport.write(data)
        self._tail.wrote(data, self._transport.get_write_buffer_size)
        is_leaving = self._phase is Phase.LEAVING
        if is_leaving and self._transport.get_write_buffer_size() > self._unsent_max:
            self._link.pause_writing()  # the loop does not, if it already had

    def writelines(self, data: Iterable[Data]) -> None:
        self.write(b"".join(data))

    def write_eof(self) -> None:
        if self._phase is not Phase.SETTLED:
            self._flags |= _ENDED
            self._transport.write_eof()

    def close(self) -> None:
        self._flags |= _CLOSING
        if self._phase is Phase.OPEN:
            self._transport.close()

    def is_closing(self) -> bool:
        return bool(self._flags & _CLOSING) or self._transport.is_closing()

    def resume_reading(self) -> None:
        if self._phase is not Phase.SETTLED:  # a request may be incomplete when an order comes
            self._transport.resume_reading()

    def set_protocol(self, protocol: Any) -> None:
        self._link.protocol = protocol

    def get_protocol(self) -> Any:
        return self._link.protocol

    def restore(self, saved: _Saved) -> None:
        """Continue where the previous process has stopped sending."""
        if saved.unsent:
            self.write(saved.unsent)
        if saved.flags & _ENDED:
            self.write_eof()

    def trim(self) -> None:
        """Forget what has been sent meanwhile."""
        self._tail.trim(self._transport.get_write_buffer_size())

    def leave(self) -> None:
        """Let nobody wait for the client: what is unsent is handed over, and so is the end."""
        self._phase = Phase.LEAVING
        self._unsent_max = self._transport.get_write_buffer_size() + UNSENT_MAX
        self._transport.set_write_buffer_limits(high=self._unsent_max)

    def arrived(self) -> bytes:
        """What has arrived by now, even if the protocol does not read."""
        data = bytearray()
        with self._duplicate() as sock, suppress(OSError):
            while len(data) < ARRIVED_MAX and (more := sock.recv(2**16)):
                data += more
        return bytes(data)

    @property
    def flags(self) -> int:
        """What is to be done once everything has been sent."""
        return self._flags | _CLOSING * self.is_closing()

    def settle(self) -> None:
        """Let the protocol have no more part in the connection."""
        self._phase = Phase.SETTLED
        self._transport.pause_reading()

    def take(self) -> socket.socket:
        """Take the connection away. The transport closes only its own descriptor."""
        sock = self._duplicate()
        self._unsent = self._last()
        self._transport.abort()
        if self._transport.get_write_buffer_size():
            self._unsent = None  # uvloop does not forget it, but sends more until `lost`
        return sock

    def lost(self) -> None:
        """The loop closes the connection now."""
        if self._unsent is None:
            self._unsent = self._last()

    @property
    def unsent(self) -> bytes:
        """What was unsent when the connection was taken; after `lost`."""
        assert self._unsent is not None
        return self._unsent

    def _last(self) -> bytes:
        return self._tail.last(self._transport.get_write_buffer_size())

    def _duplicate(self) -> socket.socket:
        fd = self._transport.get_extra_info("socket").fileno()
        return socket.socket(fileno=os.dup(fd))


class Reader(asyncio.StreamReader):
    """An asyncio.StreamReader from which a restart can take what it has not yet given out."""

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop, users: _Users) -> None:
        super().__init__(limit=limit, loop=loop)
        self._users = users
        self._kept: list[bytes] = []  # given out, but to be read again after a restart
        self._together = 0  # blocks and calls within which this is so
        self._stopped = False

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Read a request in several calls: if a restart interrupts them, the next process reads
        all of it again. Write the answer after this block."""
        mark = len(self._kept)
        self._together += 1
        try:
            yield
        finally:
            self._together -= 1
            del self._kept[mark:]

    async def read(self, n: int = -1) -> bytes:
        return await self._read(super().read, n)

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        return await self._read(super().readuntil, separator)

    async def readexactly(self, n: int) -> bytes:
        return await self._read(super().readexactly, n)

    async def _read(self, read: Callable[[Any], Awaitable[bytes]], what: Any) -> bytes:
        # To read up to the end, asyncio calls `read` again and again: these belong together.
        with self._users.waiting(), self.atomic():
            if self._stopped:
                await asyncio.get_running_loop().create_future()  # until the task is cancelled
            data = await read(what)
        if self._together:
            self._kept.append(data)
        return data

    def stop(self) -> None:
        """Give out nothing more: a task that reads waits until it is cancelled."""
        self._stopped = True

    def unread(self) -> bytes:
        """What has been received but not given out, or is to be read again. The loop runs nothing
        else meanwhile."""
        self.feed_eof()
        read = super().read(sys.maxsize)
        try:
            read.send(None)  # it need not wait, because nothing follows
        except StopIteration as done:
            return b"".join([*self._kept, done.value])
        except OSError:  # the client has reset the connection
            return b""
        raise AssertionError("a reader waits after the end of its input")


class Writer(asyncio.StreamWriter):
    """An asyncio.StreamWriter with a state that is handed over with the connection."""

    state = b""  #: what the handler in the next process gets as its `writer.state`
    listener = ""  #: the name of the listening socket: FileDescriptorName= in the socket unit
    handed_over = False  #: whether the next process continues the connection

    def __init__(self, transport: Any, protocol: Any, reader: Reader, users: _Users) -> None:
        super().__init__(transport, protocol, reader, asyncio.get_running_loop())
        self._users = users

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Wait for something other than the client. A restart may interrupt this."""
        with self._users.waiting():
            yield

    async def start_tls(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "TLS connections cannot be handed over: let a proxy in front terminate TLS"
        )


class _Users:
    """The tasks that use a connection, and how deep each is in calls that may be interrupted."""

    def __init__(self) -> None:
        self._depths: WeakKeyDictionary[asyncio.Task[Any], int] = WeakKeyDictionary()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task
        depth = self._depths.get(task, 0)
        self._depths[task] = depth + 1
        try:
            yield
        finally:
            self._depths[task] = depth

    @property
    def all_wait(self) -> bool:
        depths = [depth for task, depth in self._depths.items() if not task.done()]
        return bool(depths) and all(depths)


class _Saved(NamedTuple):
    """A connection as it is handed over."""

    flags: int
    state: bytes
    unsent: bytes
    unread: bytes

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises ValueError for a form that this version does not know."""
        if len(data) < _HEAD.size or data[0] != _FORM:
            raise ValueError("the state of the connection has an unknown form")
        _, flags, state, unsent = _HEAD.unpack_from(data)
        end = _HEAD.size + state
        return cls(flags, data[_HEAD.size : end], data[end : end + unsent], data[end + unsent :])

    def pack(self) -> bytes:
        head = _HEAD.pack(_FORM, self.flags, len(self.state), len(self.unsent))
        return b"".join((head, *self[1:]))


#: The form of what is saved, flags, the lengths of the state and of what is unsent.
_HEAD = struct.Struct("!BBII")
_FORM = 1

#: The connection is to be closed, or its sending side is, once what is unsent has been sent.
_CLOSING, _ENDED = 1, 2

_NEW = _Saved(0, b"", b"", b"")


class _Link(asyncio.Protocol):
    """A connection, as the loop and the server know it. Everything is passed on to `protocol`,
    which only sees `transport`."""

    transport: Transport

    def __init__(self, server: _Server, client: Client) -> None:
        self._server = server
        self._paused = False
        self._left: _Saved | None = None  # what is handed over, as soon as this is known
        self._socket: socket.socket | None = None  # once it is taken from the transport
        self.is_lost = False
        self.protocol: Any = asyncio.Protocol()  # none yet
        self.client = client
        self.saved = _NEW if client.state is None else _Saved.unpack(client.state)

    def connection_made(self, transport: Any) -> None:
        self.transport = Transport(transport, self)
        self._server.links.add(self)
        self.transport.restore(self.saved)
        if self.saved.flags & _CLOSING:
            self.transport.close()
            return
        try:
            self.protocol = self.begin()
            if self._paused:  # because of what is unsent
                self.protocol.pause_writing()
            if self.saved.unread:
                self.data_received(self.saved.unread)
        except Exception:
            self.transport.abort()
            raise

    def data_received(self, data: bytes) -> None:
        if isinstance(self.protocol, asyncio.BufferedProtocol):
            _fill(self.protocol, data)
        else:
            self.protocol.data_received(data)

    def eof_received(self) -> bool | None:
        keep_open: bool | None = self.protocol.eof_received()
        return keep_open

    def pause_writing(self) -> None:
        if not self._paused:
            self._paused = True
            self.protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._paused:  # `leave` may have been faster than the transport
            self._paused = False
            self.protocol.resume_writing()
        self.transport.trim()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.transport.lost()
        self._server.links.discard(self)
        self.protocol.connection_lost(exc)

    def leave(self, order: Order) -> None:
        """Let the protocol finish what it is doing."""
        self.transport.leave()
        self.resume_writing()

    def take(self) -> None:
        """Take the connection away from the protocol. The loop closes its own descriptor soon."""
        self._server.links.discard(self)
        if self._left is None:
            self.settle()
        self._socket = self.transport.take()

    def settle(self, data: bytes = b"") -> None:
        """Let the next process do all that follows, beginning with these data."""
        state = unread = b""
        if not self.transport.is_closing():
            try:
                state, unread = self.save()
            except Exception:
                self.close()
        self._left = _Saved(self.transport.flags, state, b"", unread + data)
        self.transport.settle()

    def close(self) -> None:
        """Close the connection, because of the exception that is being handled."""
        log.exception("closing a connection that cannot be handed over")
        self.transport.close()

    @property
    def left(self) -> Client:
        """The connection as it is left for the next process; once it `is_lost` to the loop."""
        assert self._left
        assert self._socket
        saved = self._left._replace(unsent=self.transport.unsent)
        return self.client._replace(socket=self._socket, state=saved.pack())

    @property
    def ended(self) -> tuple[socket.socket, bytes]:
        """The connection and what is unsent, to end it here."""
        assert self._socket
        return self._socket, self.transport.unsent

    # The two kinds

    def begin(self) -> Any:
        """Make the protocol and tell it that the connection is there."""
        raise NotImplementedError

    @property
    def is_ready(self) -> bool:
        """Whether the connection can be taken without losing anything."""
        raise NotImplementedError

    def save(self) -> tuple[bytes, bytes]:
        """What only the protocol knows: its state, and what it has not read."""
        raise NotImplementedError


class _Callbacks(_Link):
    """A connection that is served by a protocol."""

    def __init__(
        self, server: _Server, client: Client, factory: Callable[[Client], KeptProtocol]
    ) -> None:
        super().__init__(server, client)
        self._factory = factory
        self._state: Callable[[], bytes | None] = lambda: b""
        self._is_leaving = False

    def begin(self) -> Any:
        state = None if self.client.state is None else self.saved.state
        protocol = self._factory(self.client._replace(state=state))
        self._state = protocol.state
        protocol.connection_made(self.transport)
        return protocol

    def leave(self, order: Order) -> None:
        super().leave(order)
        ends = order is Order.END and not self.transport.is_closing()
        if ends and (data := self.transport.arrived()):
            self.data_received(data)
        self._is_leaving = True

    def data_received(self, data: bytes) -> None:
        """Once an order has come, the protocol may complete what it is doing, and begin nothing:
        with a busy client, it might not be found between two requests in time."""
        if self._is_leaving and self.is_ready:
            self.settle(data)
        else:
            super().data_received(data)

    @property
    def is_ready(self) -> bool:
        try:
            is_settled = self._left is not None or self.transport.is_closing()
            return is_settled or self._state() is not None
        except Exception:
            self.close()
            return True

    def save(self) -> tuple[bytes, bytes]:
        return b"".join([self._state() or b""]), b""  # TypeError, unless it is bytes


class _Streams(_Link):
    """A connection that is served by a handler, with streams."""

    def __init__(self, server: _Server, client: Client, handle: Handler, limit: int) -> None:
        super().__init__(server, client)
        self._handle = handle
        self._limit = limit
        self._order: Order | None = None
        self._users = _Users()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> Any:
        loop = asyncio.get_running_loop()
        self._reader = Reader(self._limit, loop, self._users)
        protocol = asyncio.StreamReaderProtocol(self._reader, loop=loop)
        protocol.connection_made(cast(asyncio.Transport, self.transport))
        self._writer = Writer(self.transport, protocol, self._reader, self._users)
        self._writer.state, self._writer.listener = self.saved.state, self.client.listener
        self._task = self._server.start(self._run())
        return protocol

    async def _run(self) -> None:
        try:
            await self._handle(self._reader, self._writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has closed or reset the connection
        except Exception as error:
            context = {"message": "the handler of a connection failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
        finally:
            self._writer.close()
            with suppress(OSError):  # which is logged if nobody asks for it
                await self._writer.wait_closed()

    def leave(self, order: Order) -> None:
        super().leave(order)
        if self._task is None or self.transport.is_closing():
            return
        if order is Order.KEEP:
            self._reader.stop()
        else:
            if data := self.transport.arrived():
                self.data_received(data)
            self._reader.feed_eof()
        self._order = order

    def data_received(self, data: bytes) -> None:
        if self._order is not Order.END:  # what comes now is too late
            super().data_received(data)

    @property
    def is_ready(self) -> bool:
        if self.transport.is_closing():
            return True
        return self._users.all_wait and (self._order is Order.KEEP or self._reader.at_eof())

    def save(self) -> tuple[bytes, bytes]:
        self._writer.handed_over = self._order is Order.KEEP and self.is_ready
        if self._task:
            self._task.cancel()
        return b"".join([self._writer.state]), self._reader.unread()  # TypeError, unless bytes


class _Server:
    """All connections of a service, and the order that ends it."""

    def __init__(
        self,
        service: Service,
        link: Callable[[_Server, Client], _Link],
        reload: Callable[[], object],
    ) -> None:
        self._service = service
        self._link = link
        self._reload = reload
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: set[asyncio.Task[None]] = set()
        self.links: set[_Link] = set()
        self.order: asyncio.Future[Order] = self._loop.create_future()

    def start(self, work: Any) -> asyncio.Task[None]:
        """Start a handler."""
        return _tracked(self._loop.create_task(work), self._tasks)

    def turn(self) -> None:
        """What the service has to say."""
        for event in self._service.events():
            if isinstance(event, Client):
                _tracked(self._loop.create_task(self._connect(event)), self._pending)
            elif isinstance(event, Item):
                log.warning("closing what the previous process has left besides connections")
                for fd in event.files:
                    os.close(fd)
            elif event is Order.RELOAD:
                _tracked(self._loop.create_task(self._do_reload()), self._pending)
            elif not self.order.done():
                self.order.set_result(event)

    async def _connect(self, client: Client) -> None:
        try:
            link = self._link(self, client)
            await self._loop.connect_accepted_socket(lambda: link, client.socket)
        except (OSError, ValueError) as error:
            log.error("closing a connection that cannot be served: %s", error)
            client.socket.close()

    async def _do_reload(self) -> None:
        try:
            result = self._reload()
            if inspect.isawaitable(result):
                await result
        except Exception:
            log.exception("the reload failed")
        finally:
            self._service.ready()

    async def leave(self, order: Order, grace: float) -> tuple[list[_Link], list[_Link]]:
        """Take all connections as soon as nothing is lost by that, and the others after `grace`
        seconds. Returns those that can continue, and those that cannot."""
        deadline = self._loop.time() + grace
        if self._pending:
            await asyncio.wait(self._pending, timeout=grace)
        for link in list(self.links):
            try:
                link.leave(order)
            except Exception:  # of a protocol
                link.close()
        ready: list[_Link] = []
        while await self._take_ready(ready) and self._loop.time() < deadline:
            await asyncio.sleep(INTERVAL)
        late = list(self.links)
        for link in late:
            link.take()
        if late:
            log.warning(
                "closing %s that still had work to do after %s s",
                counted(len(late), "connection"),
                grace,
            )
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, deadline - self._loop.time()))
        while not all(link.is_lost for link in ready + late):
            await asyncio.sleep(0)
        return ready, late

    async def _take_ready(self, taken: list[_Link]) -> bool:
        """Take the connections that are ready; return whether there are others."""
        for link in list(self.links):
            if link in self.links and link.is_ready:  # still there
                link.take()
                taken.append(link)
                if len(taken) % CHUNK == 0:  # the transports close their descriptors
                    await asyncio.sleep(0)
        return bool(self.links)


async def _serve(
    service: Service,
    link: Callable[[_Server, Client], _Link],
    reload: Callable[[], object],
    grace: float,
) -> None:
    loop = asyncio.get_running_loop()
    server = _Server(service, link, reload)
    for number in service.SIGNALS:
        loop.add_signal_handler(number, service.obey, number)
    loop.add_reader(service, server.turn)
    try:
        service.ready()
        order = await server.order
    finally:
        loop.remove_reader(service)
    ready, late = await server.leave(order, grace)
    if order is Order.KEEP:
        rest = {client.socket for client in service.leave(link.left for link in ready)}
        ready = [link for link in ready if link.ended[0] in rest]
    service.end(link.ended for link in ready + late)


def _tracked(task: asyncio.Task[None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """Keep a task, which the loop itself does not, until it has ended."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def _fill(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
    """Pass data to a protocol that provides the buffer for it."""
    rest = memoryview(data)
    while rest:
        buffer = memoryview(protocol.get_buffer(len(rest))).cast("B")
        size = min(len(buffer), len(rest))
        buffer[:size] = rest[:size]
        protocol.buffer_updated(size)
        rest = rest[size:]
