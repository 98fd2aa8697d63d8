"""The service: what was passed to it, what it keeps, and what it is told."""

from __future__ import annotations

import enum
import errno
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from typing import TypeVar
from weakref import WeakKeyDictionary

from outlive import activation, channel, descriptors
from outlive.canary import CANARY
from outlive.ending import Connection, end
from outlive.items import ENDED, FILES_MAX, Arrival, Client, Ended, Handover, Item
from outlive.leaving import L, Leaving
from outlive.listener import Listener
from outlive.notify import Notifier
from outlive.remedies import remedy
from outlive.signals import Signals
from outlive.store import Store
from outlive.words import counted

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The names of what a service keeps besides the channel.
SETTINGS, MEMORY = "settings", "memory"

#: Seconds between two attempts at what failed for lack of descriptors.
PAUSE = 0.25

#: New clients in one call of `events`: those that are connected must not wait for all of them.
CLIENTS = 32

#: Descriptors that are not used for connections: for the files of the program.
SPARE = 32

#: Seconds after which the kernel probes a silent client.
KEEPALIVE = 60

#: The maximum length of the accept queue of a socket that was not passed.
BACKLOG = 4096

#: Seconds for closing connections whose state cannot be read.
UNREADABLE_TIME = 1

#: EX_CONFIG of sysexits.h.
INVALID_SETTINGS = 78

#: Problems, for the status and the log.
FALLBACK = "{} is invalid; using the last good configuration"
WAITING = (
    "connections of the previous process wait, because there are no descriptors for them; raise"
    " LimitNOFILE= in the unit"
)
STOPPED = (
    "the previous process was stopped by SIGTERM and closed its connections; if this was a"
    " restart, set RestartKillSignal=SIGUSR2 in the unit"
)

#: The errors for lack of descriptors or memory.
SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Order(enum.Enum):
    """What the service is told to do."""

    RELOAD = "reload"  #: Read the settings again, then call `ready`, even if they are invalid.
    KEEP = "keep"  #: `leave` the connections for the next process, and exit with status 0.
    END = "end"  #: `end` the connections, and exit with status 0.


class Service:
    """What a service manager passes to this process, and what it tells it.

    `program`, 1 to 10 bytes, and `version` name the format of the bytes that are left with the
    connections. Change the version whenever their meaning changes, and list the `earlier` versions
    that this program can also read. Connections of any other version are closed cleanly.

    `listen` is the address (host, port) to listen on if no socket was passed. Without systemd,
    everything works, except that nothing outlives the process.

    Creating a service raises the limit of descriptors, and takes over the signals HUP (reload),
    USR2 (restart), TERM and INT (stop), and ALRM (timer), which only the main thread can do. With
    `signals=False`, they are left to another loop, which calls `obey` with each of `SIGNALS`.

    The connections of the previous process are among the `events`. Those that have not been handed
    out yet wait for the next process if this one fails.
    """

    SIGNALS = (signal.SIGHUP, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGALRM)

    def __init__(
        self,
        program: str,
        version: int = 1,
        *,
        earlier: Iterable[int] = (),
        listen: tuple[str, int] | None = None,
        signals: bool = True,
    ) -> None:
        self._form = channel.Format(program.encode(), version, tuple(earlier))
        descriptors.raise_limit()
        self._limit = descriptors.limit() - SPARE
        #: Descriptors in a message: the next process must have room for all of them.
        self._batch = max(1, min(FILES_MAX, self._limit // 4))
        #: Connections may have descriptors up to this one: while they are in flight, each of their
        #: messages has three more, and the limit applies to all of them.
        self._full = self._limit - 3 * (self._limit // self._batch + 1)
        self._notifier = Notifier(os.environ)
        self._status = ""
        self._problems: dict[str, str] = {}
        self._path = ""  # of the settings
        stores = channel.NAMES | {CANARY, SETTINGS, MEMORY}
        passed = activation.passed_descriptors(os.environ, stores)
        self._store = Store(passed.stored, self._notifier)
        self._connected = passed.connected
        self._owns_listeners = not passed.listening
        #: The listening sockets.
        self.listeners = passed.listening or ([_listen(listen)] if listen else [])
        self._names: WeakKeyDictionary[socket.socket, str] = WeakKeyDictionary()
        self._arrival: Iterator[Client | Item | Ended] | None = None
        self._is_full = False
        self._signals = Signals(self.SIGNALS if signals else ())
        self._poll = select.epoll()
        self._poll.register(self._signals, select.EPOLLIN)
        for one in self.listeners:
            one.set_options(KEEPALIVE)
        self._paused = {self._channel.receive_end, *(one.socket for one in self.listeners)}
        for sock in self._paused:
            self._poll.register(sock, 0)
        self._resume()
        if self._connected:
            self._signals.add(0)  # so that the loop comes here

    # What outlives the process

    @property
    def keeps(self) -> bool:
        """Whether the service manager really keeps what is left for the next process."""
        return self._store.keeps

    def leave(self, items: Iterable[L], *, whole: bool = False) -> list[L]:
        """Leave connections for the next process, and close them here. Each is a socket and some
        bytes: a pair, or a `Client` if descriptors belong to it. An `Item` is anything else. Do
        not read from the sockets or write to them any more, and do not shut them down.

        This never fails. Returns what cannot be left, as it was given: TLS connections, and those
        for which there is no room (which happens only if another process of the same user has
        descriptors in flight). With `whole`, nothing is left in this case, and all are returned:
        the process can keep serving them, or `end` them.
        """
        try:
            handover = Handover(self._channel.send_end, self._form)
        except OSError as error:
            log.warning("nothing can be left for the next process: %s%s", error, remedy(error))
            return list(items)
        rest = Leaving[L](handover, self._names, whole=whole).leave(items, self._batch)
        log.info("left %s for the next process", counted(handover.sent, "connection"))
        handover.close()
        return rest

    @property
    def remembered(self) -> bytes | None:
        """What this process or an earlier one last remembered, or None."""
        return self._store.get(MEMORY)

    def remember(self, data: bytes) -> None:
        """Have the service manager keep some bytes, up to 16 MiB, for this service. They outlive
        even a process that is killed, but not a stop."""
        self._store.put(MEMORY, data)
        self._set_timer()

    def settings(self, path: str, parse: Callable[[str], T]) -> T:
        """What `parse` makes of the configuration file. If the file is invalid (OSError,
        ValueError), this logs an error and uses the last good one, even if only an earlier process
        has read it: a mistake ends no service. If there is none, exits with status 78."""
        if self._path not in ("", path):
            raise ValueError(
                f"{path}: the settings are in {self._path}, and only one file is kept"
            )
        self._path = path
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            result = parse(text)
        except (OSError, ValueError) as error:
            log.error("%s: %s", path, getattr(error, "strerror", None) or error)
            return self._last_good(path, parse)
        self._store.put(SETTINGS, text.encode())
        self._set_timer()
        self._set_problem(SETTINGS, "")
        return result

    def _last_good(self, path: str, parse: Callable[[str], T]) -> T:
        kept = self._store.get(SETTINGS)
        if kept is None:
            sys.exit(INVALID_SETTINGS)
        try:
            result = parse(kept.decode())
        except ValueError as error:
            log.error("the last good configuration is invalid, too: %s", error)
            sys.exit(INVALID_SETTINGS)
        self._set_problem(SETTINGS, FALLBACK.format(path))
        return result

    # What the service manager is told

    def ready(self, status: str = "") -> None:
        """The start or a reload is complete; `status` is for `systemctl status`."""
        if status:
            self.status(status)
        self._notifier.ready()

    def status(self, text: str) -> None:
        """Set the text that `systemctl status` shows. Problems that this object knows of, such as
        an invalid configuration file, follow it."""
        self._status = text
        self._notifier.status("; ".join(filter(None, (text, *self._problems.values()))))

    def _set_problem(self, name: str, text: str) -> None:
        if text == self._problems.get(name, ""):
            return
        self._problems[name] = text
        if text:
            log.warning("%s", text)
        self.status(self._status)

    # What the service is told

    def fileno(self) -> int:
        """A descriptor that is readable when there are `events`: for selectors, for asyncio's
        add_reader, for trio.lowlevel.wait_readable."""
        return self._poll.fileno()

    def events(self) -> Iterator[Client | Item | Order]:
        """What has happened: clients and orders. Never blocks. The next event is fetched when the
        previous one has been dealt with, so exhaust the iterator. After `Order.KEEP` and
        `Order.END`, there is none.

        This also sends the keep-alive notifications for the watchdog: a loop that does not come
        here is restarted.
        """
        ready = {fd for fd, _ in self._poll.poll(0)}
        while self._connected:
            sock = self._connected.pop()
            sock.setblocking(False)
            yield Client(sock)
        if self._channel.receive_end.fileno() in ready:
            yield from self._arrived()  # before new clients take their room
        else:
            for listener in self.listeners:
                if listener.socket.fileno() in ready:
                    yield from self._accepted(listener)
        for number in self._signals.received():
            for event in self._on_signal(number):
                yield event
                if event in (Order.KEEP, Order.END):
                    return

    def obey(self, number: int) -> None:
        """Receive a signal that another loop has caught: one of `SIGNALS`."""
        self._signals.add(number)

    def end(self, connections: Iterable[Connection], seconds: float = 5) -> None:
        """End connections without losing an answer. Each is a socket, the bytes that are not sent
        yet and, optionally, a function that answers input which has already arrived: it is given
        the bytes, and returns those to send.

        Takes up to this many seconds. Clients that have not read their answers by then are reset.
        """
        self._notifier.extend_timeout(seconds + 1)
        end(connections, seconds)

    @property
    def _channel(self) -> channel.Channel:
        return self._store.channel

    def _on_signal(self, number: int) -> Iterator[Client | Item | Order]:
        """Yields what a signal means. At a stop, the clients that still wait come first."""
        if number == signal.SIGALRM:
            self._tick()
        elif number == signal.SIGHUP:
            self._notifier.reloading()
            yield Order.RELOAD
        elif number == signal.SIGUSR2 and self.keeps:
            self._notifier.stopping()
            yield Order.KEEP  # what has not been fetched from the channel stays there
        elif number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            self._notifier.stopping()
            yield from self._last_clients()
            if number == signal.SIGTERM and self.keeps:
                self._note_stop()
            yield Order.END

    def _last_clients(self) -> Iterator[Client | Item]:
        """Everything in the channel, and in accept queues that would be lost with this process."""
        while self._arrival or self._next_arrival():
            yield from self._arrived()
        for listener in self.listeners if self._owns_listeners else ():
            while clients := list(self._accepted(listener)):
                yield from clients

    def _note_stop(self) -> None:
        """Leave a note. A stop empties the store; if the next process finds the note, this was a
        restart that should have been announced by SIGUSR2."""
        with suppress(OSError):
            note = Handover(self._channel.send_end, self._form)
            note.complete()
            with closing(note):
                note.send([ENDED])

    def _arrived(self) -> Iterator[Client | Item]:
        """The items of one message that the previous process has left."""
        if not self._arrival:
            self._arrival = self._next_arrival()
        for item in self._arrival or ():  # not "yield from", which would close it with this one
            if isinstance(item, Ended):
                self._set_problem(STOPPED, STOPPED)
                continue
            if isinstance(item, Client):
                self._names[item.socket] = item.listener
            yield item
        self._arrival = None

    def _next_arrival(self) -> Iterator[Client | Item | Ended] | None:
        """The next message; None if there is none, or no room for it. Connections whose state
        cannot be read are closed."""
        unreadable: list[socket.socket] = []
        arrival = None
        while not arrival:
            try:
                arrival = Arrival(self._channel.receive_end, self._form, self._limit)
            except channel.HandoverError as error:
                log.error(
                    "closing %s whose state cannot be restored: %s",
                    *(counted(len(error.sockets), "connection"), error),
                )
                unreadable += error.sockets
            except BlockingIOError:
                break
            except (OSError, MemoryError):
                self._set_problem(WAITING, WAITING)
                self._pause(self._channel.receive_end)
                break
        end([(sock, b"") for sock in unreadable], UNREADABLE_TIME)
        return self._started(arrival) if arrival else None

    def _started(self, arrival: Arrival) -> Iterator[Client | Item | Ended]:
        self._set_problem(WAITING, "")
        if arrival.lost:
            log.error(
                "closing %s: the previous process died while it restored the last of them",
                counted(arrival.lost, "connection"),
            )
        return iter(arrival)

    def _accepted(self, listener: Listener) -> Iterator[Client]:
        """Some new clients. Without descriptors for more, they wait in the accept queue."""
        for _ in range(CLIENTS):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in SHORTAGES:
                    self._pause_listeners(error)
                    return
                continue  # the client has already disconnected
            sock.setblocking(False)
            self._names[sock] = listener.name
            is_last = sock.fileno() >= self._full  # they are numbered from the lowest free one
            yield Client(sock, None, address, listener.name)
            if is_last:
                self._pause_listeners(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                return

    def _pause_listeners(self, error: OSError) -> None:
        if not self._is_full:
            self._is_full = True
            log.warning("new clients wait: %s%s", error, remedy(error))
        for one in self.listeners:
            self._pause(one.socket)

    def _pause(self, sock: socket.socket) -> None:
        """Do not look at a socket for a while."""
        self._poll.modify(sock, 0)
        self._paused.add(sock)
        self._set_timer()

    def _tick(self) -> None:
        """What is done at intervals."""
        if self._notifier.watchdog_interval:
            self._notifier.watchdog()
        self._store.retry()
        self._resume()

    def _resume(self) -> None:
        """Look at all sockets."""
        for sock in self._paused:
            self._poll.modify(sock, select.EPOLLIN)
        self._paused.clear()
        self._set_timer()

    def _set_timer(self) -> None:
        """Have SIGALRM sent at intervals while there is something to do."""
        waits = self._paused or self._store.missing
        interval = self._notifier.watchdog_interval / 2
        seconds = min(interval or PAUSE, PAUSE) if waits else interval
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)


def _listen(address: tuple[str, int]) -> Listener:
    return Listener(socket.create_server(address, backlog=BACKLOG), "")
