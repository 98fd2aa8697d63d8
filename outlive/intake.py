"""The clients of a service: new ones, and those that the previous process has left."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from outlive.channel import Format, HandoverError
from outlive.ending import end
from outlive.items import FILES_MAX, Arrival, Client, Ended, Item
from outlive.listener import Listener
from outlive.remedies import remedy
from outlive.words import counted

log = logging.getLogger(__name__)

#: New clients at a time: those that are connected must not wait for all of them.
CLIENTS = 32

#: Descriptors that are not used for connections: for the files of the program.
SPARE = 32

#: Seconds after which the kernel probes a silent client.
KEEPALIVE = 60

#: Seconds for closing connections whose state cannot be read.
UNREADABLE_TIME = 1

#: The errors for lack of descriptors or memory.
SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

#: Problems, by name.
WAITING = (
    "connections of the previous process wait, because there are no descriptors for them; raise"
    " LimitNOFILE= in the unit"
)
STOPPED = (
    "the previous process was stopped by SIGTERM and closed its connections; if this was a"
    " restart, set RestartKillSignal=SIGUSR2 in the unit"
)


class Room(NamedTuple):
    """How many descriptors there are, and for what. They are numbered from the lowest free one."""

    end: int  #: none is used for connections from this one on
    batch: int  #: in a message: the next process must have room for all of them
    full: int  #: none is used for new connections from this one on

    @classmethod
    def of(cls, limit: int) -> Room:
        """The room with a limit, RLIMIT_NOFILE. It also limits the descriptors in flight, among
        which each message has three more."""
        end = limit - SPARE
        batch = max(1, min(FILES_MAX, end // 4))
        return cls(end, batch, end - 3 * (end // batch + 1))


class Intake:
    """Accepts new clients, and takes over those in the channel, while there is room for them."""

    def __init__(
        self,
        receive_end: socket.socket,
        form: Format,
        listeners: Sequence[Listener],
        room: Room,
        report: Callable[[str, str], None],
    ) -> None:
        """`report` is called with the name of a problem and a text, "" if it is solved."""
        self._receive_end = receive_end
        self._form = form
        self._listeners = listeners
        self._room = room
        self._report = report
        self._arrival: Iterator[Client | Item | Ended] | None = None
        self._is_full = False
        #: By connection, the name of its listener.
        self.names: WeakKeyDictionary[socket.socket, str] = WeakKeyDictionary()
        self._poll = select.epoll()
        self._paused = {receive_end, *(one.socket for one in listeners)}
        for one in listeners:
            one.set_options(KEEPALIVE)
        for sock in self._paused:
            self._poll.register(sock, 0)
        self.resume()

    def fileno(self) -> int:
        """The descriptor of an epoll instance, which is readable when there are clients."""
        return self._poll.fileno()

    def clients(self) -> Iterator[Client | Item]:
        """Those that can be fetched now, but not all of them. New clients wait for those of the
        previous process, or could take their room."""
        ready = {fd for fd, _ in self._poll.poll(0)}
        if self._receive_end.fileno() in ready:
            yield from self._arrived()
        else:
            for listener in self._listeners:
                if listener.socket.fileno() in ready:
                    yield from self._accepted(listener)

    def last_clients(self, *, queues: bool) -> Iterator[Client | Item]:
        """All that are in the channel and, with `queues`, in the accept queues."""
        while self._arrival or self._next_arrival():
            yield from self._arrived()
        for listener in self._listeners if queues else ():
            while clients := list(self._accepted(listener)):
                yield from clients

    @property
    def is_paused(self) -> bool:
        """Whether something is not looked at until `resume` is called."""
        return bool(self._paused)

    def resume(self) -> None:
        """Look at everything again."""
        for sock in self._paused:
            self._poll.modify(sock, select.EPOLLIN)
        self._paused.clear()

    def _pause(self, sock: socket.socket) -> None:
        self._poll.modify(sock, 0)
        self._paused.add(sock)

    # The channel

    def _arrived(self) -> Iterator[Client | Item]:
        """The items of one message."""
        if not self._arrival:
            self._next_arrival()
        for item in self._arrival or ():  # not "yield from", which would close it along with this
            if isinstance(item, Ended):
                self._report(STOPPED, STOPPED)
                continue
            if isinstance(item, Client):
                self.names[item.socket] = item.listener
            yield item
        self._arrival = None

    def _next_arrival(self) -> bool:
        """Look at the next message; return whether there is one, and room for it. Connections
        whose state cannot be read are closed."""
        unreadable: list[socket.socket] = []
        while True:
            try:
                arrival = Arrival(self._receive_end, self._form, self._room.end)
            except HandoverError as error:
                unreadable += error.sockets
                closed = counted(len(error.sockets), "connection")
                log.error("closing %s whose state cannot be restored: %s", closed, error)
            except BlockingIOError:
                break
            except (OSError, MemoryError):
                self._report(WAITING, WAITING)
                self._pause(self._receive_end)
                break
            else:
                self._begin(arrival)
                break
        end([(sock, b"") for sock in unreadable], UNREADABLE_TIME)
        return self._arrival is not None

    def _begin(self, arrival: Arrival) -> None:
        self._report(WAITING, "")
        self._arrival = iter(arrival)
        if arrival.lost:
            log.error(
                "closing %s: the previous process died while it restored the last of them",
                counted(arrival.lost, "connection"),
            )

    # Listeners

    def _accepted(self, listener: Listener) -> Iterator[Client]:
        """Some new clients. Those for which there are no descriptors wait in the accept queue."""
        for _ in range(CLIENTS):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in SHORTAGES:
                    self._wait_for_room(error)
                    return
                continue  # the client has already disconnected
            sock.setblocking(False)
            self.names[sock] = listener.name
            is_last = sock.fileno() >= self._room.full
            yield Client(sock, None, address, listener.name)
            if is_last:
                self._wait_for_room(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                return
            self._is_full = False

    def _wait_for_room(self, error: OSError) -> None:
        """Accept no more clients until `resume` is called; say so once."""
        if not self._is_full:
            self._is_full = True
            log.warning("new clients wait: %s%s", error, remedy(error))
        for one in self._listeners:
            self._pause(one.socket)
