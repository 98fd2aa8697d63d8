"""Leaving connections and other items for the next process."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from outlive.items import ITEMS_MAX, Client, Handover, Item, Record
from outlive.remedies import remedy

log = logging.getLogger(__name__)

#: What can be left: a connection and its state, as a pair or a `Client`; or an `Item`.
Left = Client | Item | tuple[socket.socket, bytes]

L = TypeVar("L", bound=Left)

#: The errors if the channel is full, or if the user has too many descriptors in flight.
NO_ROOM = {errno.EAGAIN, errno.ETOOMANYREFS}


class Leaving(Generic[L]):
    """One handover, from the side of the process that leaves."""

    def __init__(
        self, handover: Handover, listeners: Mapping[socket.socket, str], *, whole: bool
    ) -> None:
        """With `whole`, nothing is left unless everything is. `listeners` are the names of the
        listeners of connections."""
        self._handover = handover
        self._listeners = listeners
        self._whole = whole
        self._sent: list[L] = []  # and still open
        self._rest: list[L] = []

    def leave(self, items: Iterable[L], files_max: int) -> list[L]:
        """Leave items in messages of up to `files_max` descriptors, and close them here. Return
        those that could not be left, which stay open."""
        if not self._whole:
            self._handover.complete()
        for batch in _batches(self._possible(items), files_max):
            if self._whole and self._rest:
                self._rest += batch
            else:
                self._send(batch)
        if not self._whole:
            return self._rest
        if self._rest:
            return self._sent + self._rest
        self._handover.complete()
        self._close_sent()
        return []

    def _possible(self, items: Iterable[L]) -> Iterator[L]:
        """Those that can be handed over; the keys of a TLS connection are in this process."""
        for item in items:
            if _is_tls(item):
                self._refuse([item], "a TLS connection cannot be handed over: decrypt in a proxy")
            else:
                yield item

    def _send(self, batch: list[L]) -> None:
        """Send a message, or several if a state does not fit into one."""
        try:
            self._handover.send([self._record(item) for item in batch])
        except (OSError, MemoryError) as error:
            if len(batch) == 1 or getattr(error, "errno", None) in NO_ROOM:
                self._refuse(batch, f"{error}{remedy(error)}")
                return
            middle = len(batch) // 2
            self._send(batch[:middle])
            self._send(batch[middle:])
        else:
            self._sent += batch
            if not self._whole:
                self._close_sent()

    def _refuse(self, batch: list[L], reason: str) -> None:
        if not self._rest:
            log.warning("not everything can be left for the next process: %s", reason)
        self._rest += batch

    def _record(self, item: L) -> Record:
        if isinstance(item, Item):
            return Record.of_item(item)
        client = Client(*item)
        name = client.listener or self._listeners.get(client.socket, "")
        return Record.of_client(client._replace(listener=name))

    def _close_sent(self) -> None:
        for item in self._sent:
            files = item.files if isinstance(item, (Client, Item)) else ()
            if not isinstance(item, Item):
                item[0].close()
            for fd in files:
                os.close(fd)
        self._sent.clear()


def _is_tls(item: Left) -> bool:
    ssl = sys.modules.get("ssl")  # where it is not loaded, there is no TLS
    return ssl is not None and not isinstance(item, Item) and isinstance(item[0], ssl.SSLSocket)


def _batches(items: Iterable[L], files_max: int) -> Iterator[list[L]]:
    """The items in groups that fit into a message. One that does not fit in any is on its own."""
    batch: list[L] = []
    room = files_max
    for item in items:
        files = len(item.files) if isinstance(item, (Client, Item)) else 0
        need = files if isinstance(item, Item) else files + 1
        if batch and (need > room or len(batch) == ITEMS_MAX):
            yield batch
            batch, room = [], files_max
        batch.append(item)
        room -= need
    if batch:
        yield batch
