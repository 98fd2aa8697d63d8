"""The service: what was passed to it, what it keeps, and what it is told."""

from __future__ import annotations

import atexit
import enum
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from typing import TypeVar

from outlive import activation, channel, descriptors, library
from outlive.canary import CANARY
from outlive.ending import Connection, end
from outlive.intake import Intake, Room
from outlive.items import ENDED, Client, Handover, Item
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

#: Seconds between two attempts at what has failed for lack of descriptors.
PAUSE = 0.25

#: The maximum length of the accept queue of a socket that was not passed.
BACKLOG = 4096

#: EX_CONFIG of sysexits.h.
INVALID_SETTINGS = 78

#: For the status.
FALLBACK = "{} is invalid; using the last good configuration"


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

    Raises PassedError (`outlive.activation`) if what was passed cannot be served.
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
        library.load()
        stores = channel.NAMES | {CANARY, SETTINGS, MEMORY}
        passed = activation.passed_descriptors(os.environ, stores)
        self._notifier = Notifier(os.environ)
        self._store = Store(passed.stored, self._notifier)
        self._connected = passed.connected
        self._owns_listeners = not passed.listening
        #: The listening sockets.
        self.listeners = passed.listening or ([_listen(listen)] if listen else [])
        self._status = ""
        self._problems: dict[str, str] = {}
        self._path = ""  # of the settings
        self._room = Room.of(descriptors.limit())
        receive_end = self._store.channel.receive_end
        self._intake = Intake(
            receive_end, self._form, self.listeners, self._room, self._set_problem
        )
        self._signals = Signals(self.SIGNALS if signals else ())
        self._poll = select.epoll()
        self._poll.register(self._intake, select.EPOLLIN)
        self._poll.register(self._signals, select.EPOLLIN)
        self._timer = 0.0
        # On exit, Python and asyncio restore the default action of a signal, which would kill.
        atexit.register(_stop_timer)
        self._set_timer()
        if self._connected:
            self._signals.add(0)  # so that the loop calls `events`

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
        descriptors in flight, or if the limit of descriptors was lowered). With `whole`, nothing
        is left in this case, and all are returned: the process can keep serving them, or `end`
        them.
        """
        try:
            handover = Handover(self._store.channel.send_end, self._form)
        except OSError as error:
            log.warning("nothing can be left for the next process: %s%s", error, remedy(error))
            return list(items)
        with closing(handover):
            leaving = Leaving[L](handover, self._intake.names, whole=whole)
            rest = leaving.leave(items, self._room.batch)
        left = counted(0 if whole and rest else handover.sent, "connection")
        log.info("left %s for the next process", left)
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
            raise ValueError(f"{path}: only one file of settings is kept, which is {self._path}")
        self._path = path
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            result = parse(text)
        except (OSError, ValueError) as error:
            log.error("%s: %s", path, getattr(error, "strerror", None) or error)
            return self._last_good(parse)
        self._store.put(SETTINGS, text.encode())
        self._set_timer()
        self._set_problem(SETTINGS, "")
        return result

    def _last_good(self, parse: Callable[[str], T]) -> T:
        kept = self._store.get(SETTINGS)
        if kept is None:
            sys.exit(INVALID_SETTINGS)
        try:
            result = parse(kept.decode())
        except ValueError as error:
            log.error("the last good configuration is invalid as well: %s", error)
            sys.exit(INVALID_SETTINGS)
        self._set_problem(SETTINGS, FALLBACK.format(self._path))
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
        """Show a problem, or with "" none, under a name."""
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
        """What has happened: clients and orders. Does not wait for any. A client counts as taken
        over when the next event is asked for, so exhaust the iterator. Nothing follows
        `Order.KEEP` and `Order.END`.

        This also sends the keep-alive notifications for the watchdog: a process whose loop does
        not come here is restarted.
        """
        while self._connected:
            sock = self._connected.pop()
            sock.setblocking(False)
            yield Client(sock)
        yield from self._intake.clients()
        self._set_timer()
        # The handler of a signal that arrives later may run first: a reload comes before an end.
        for number in sorted(self._signals.received(), key=signal.SIGHUP.__ne__):
            for event in self._meaning(number):
                if event in (Order.KEEP, Order.END):
                    _stop_timer()
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

    def _meaning(self, number: int) -> Iterator[Client | Item | Order]:
        """What a signal means. Before a stop, there may be clients that would be lost."""
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
            yield from self._intake.last_clients(queues=self._owns_listeners)
            if number == signal.SIGTERM and self.keeps:
                self._leave_note()
            yield Order.END

    def _leave_note(self) -> None:
        """Leave a note that this was a stop. A stop empties the store: if the next process finds
        the note, this was in fact a restart, of which SIGUSR2 should have told."""
        with (
            suppress(OSError),
            closing(Handover(self._store.channel.send_end, self._form)) as note,
        ):
            note.complete()
            note.send([ENDED])

    def _tick(self) -> None:
        """What is done at intervals."""
        if self._notifier.watchdog_interval:
            self._notifier.watchdog()
        self._store.retry()
        self._intake.resume()
        self._set_timer()

    def _set_timer(self) -> None:
        """Have SIGALRM sent at intervals as long as there is something to do then."""
        seconds = self._notifier.watchdog_interval / 2
        if self._intake.is_paused or self._store.missing:
            seconds = min(seconds or PAUSE, PAUSE)
        if seconds != self._timer:
            self._timer = seconds
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)


def _stop_timer() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)


def _listen(address: tuple[str, int]) -> Listener:
    return Listener(socket.create_server(address, backlog=BACKLOG), "")
