"""What a service leaves for its next process: connections, and other items, in channel messages.

A message has two descriptors besides those of its items. One says whether the message counts: all
messages of one handover share it, so they become valid at the same instant. The other counts the
items that have been handed out. A message stays in the channel until that is all of them, so a
process that dies in between costs the items that it was given, and no other.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from outlive import channel
from outlive.channel import Format

#: The version of what is defined here; that of the program is in the `Format`.
VERSION = 1

#: Descriptors of items in a message, besides two of its own.
FILES_MAX = channel.BATCH - 2

#: Items in a message: some have no descriptors.
ITEMS_MAX = 1024

#: The beginning of a message's state: the version, and the number of its items.
_HEAD = struct.Struct("!BH")

#: An item: its kind, the number of its descriptors, the lengths of its listener's name and of its
#: state, which follow.
_RECORD = struct.Struct("!BHHI")


class Kind(IntEnum):
    """The kinds of items, as they are sent."""

    CLIENT, ITEM, ENDED = range(3)


#: How many descriptors an item of each kind can have.
_FILES: dict[int, range] = {
    Kind.CLIENT: range(1, FILES_MAX + 1),
    Kind.ITEM: range(FILES_MAX + 1),
    Kind.ENDED: range(1),
}


class Client(NamedTuple):
    """A connection, which does not block. If the previous process has left it, `state` is what it
    gave to `leave`, and `files` are the descriptors that came with it; otherwise, it is new."""

    socket: socket.socket
    state: bytes | None = None
    address: Any = None  #: None if the client has already disconnected
    listener: str = ""  #: where it was accepted: FileDescriptorName= in the socket unit
    files: tuple[int, ...] = ()


class Item(NamedTuple):
    """Something else that the previous process has left: bytes, and any number of descriptors,
    which now belong to this process."""

    state: bytes
    files: tuple[int, ...] = ()


class Ended:
    """The previous process was told to stop for good, although it was restarted."""


class Record(NamedTuple):
    """An item as it is sent."""

    kind: Kind
    files: tuple[int, ...]  # of a client, its socket is the first
    listener: bytes
    state: bytes

    @classmethod
    def of_client(cls, client: Client) -> Record:
        """The record of a connection."""
        files = (client.socket.fileno(), *client.files)
        return cls(Kind.CLIENT, files, client.listener.encode(), client.state or b"")

    @classmethod
    def of_item(cls, item: Item) -> Record:
        """The record of anything else."""
        return cls(Kind.ITEM, item.files, b"", item.state)


ENDED = Record(Kind.ENDED, (), b"", b"")


class _Descriptor(int):
    """A number that has itself as its descriptor."""

    def fileno(self) -> int:
        return int(self)


class Handover:
    """The messages of one handover. They count once `complete` was called; a handover that is
    given up is as if it had never begun."""

    def __init__(self, end: socket.socket, form: Format) -> None:
        """Raises OSError if there are no descriptors left."""
        self._end = end
        self._form = form
        self._complete = _counter()
        self.sent = 0  # connections

    def send(self, records: Sequence[Record]) -> None:
        """Put records with up to `FILES_MAX` descriptors into the channel as one message. Raises
        what `channel.send` raises."""
        files = [fd for record in records for fd in record.files]
        given = _counter()
        try:
            own = [self._complete, given, *files]
            write = partial(_write, records)
            channel.send(self._end, self._form, [_Descriptor(fd) for fd in own], write)
        finally:
            os.close(given)
        self.sent += sum(record.kind == Kind.CLIENT for record in records)

    def complete(self) -> None:
        """Make all messages count, in one step."""
        os.eventfd_write(self._complete, 1)

    def close(self) -> None:
        """Close the descriptor of the handover."""
        os.close(self._complete)


def _write(records: Sequence[Record], file: BinaryIO) -> None:
    file.write(_HEAD.pack(VERSION, len(records)))
    for kind, files, listener, state in records:
        file.write(_RECORD.pack(kind, len(files), len(listener), len(state)))
        file.write(listener)
        file.write(state)


class Arrival:
    """A message in the channel, whose items are handed out one by one."""

    def __init__(self, end: socket.socket, form: Format, limit: int) -> None:
        """Look at the next message; `limit` is the number that no descriptor may reach.

        Raises BlockingIOError if there is none, OSError (EMFILE) if there is no room for it, and
        HandoverError if it cannot be read. In the last case, it is no longer in the channel.
        """
        self._end = end
        try:
            message = channel.receive(end, form, copy=True)
            self._records = message.read(_read)
        except (channel.HandoverError, EOFError):
            channel.discard(end)
            raise
        self._files = message.files()
        if any(fd >= limit for fd in self._files):
            self._close(self._files)
            raise channel.no_room()
        counts = _value(self._files[0]) > 0
        self.given = _value(self._files[1]) if counts else len(self._records)
        self.lost = self.given if counts else 0  # with the process that was given them

    def __iter__(self) -> Iterator[Client | Item | Ended]:
        """The items that nobody was given yet. The message leaves the channel after the last."""
        complete, given, *files = self._files
        for index, record in enumerate(self._records):
            own, files = files[: len(record.files)], files[len(record.files) :]
            if index < self.given:
                self._close(own)
                continue
            os.eventfd_write(given, 1)
            if (item := _unpack(record._replace(files=tuple(own)))) is not None:
                yield item
        channel.discard(self._end)
        self._close([complete, given])

    @staticmethod
    def _close(files: Iterable[int]) -> None:
        for fd in files:
            os.close(fd)


def _read(file: BinaryIO, size: int, count: int) -> list[Record]:
    """The records of a message with `count` descriptors, whose numbers are not known here."""
    head = file.read(_HEAD.size)
    version, number = _HEAD.unpack(head)
    if version != VERSION:
        raise ValueError(f"the items are of version {version}, not {VERSION}")
    left, records = size - len(head), []
    for _ in range(number):
        kind, files, listener, state = _RECORD.unpack(file.read(_RECORD.size))
        left -= _RECORD.size + listener + state
        if left < 0:
            raise ValueError("the state is truncated")
        name = file.read(listener)
        records.append(Record(_kind(kind, files), (-1,) * files, name, file.read(state)))
    if left or sum(len(record.files) for record in records) + 2 != count:
        raise ValueError(f"{left} unexpected bytes, or not {count} descriptors")
    return records


def _kind(number: int, files: int) -> Kind:
    """The kind of an item with so many descriptors. Raises ValueError if there is none."""
    if files not in _FILES.get(number, ()):
        raise ValueError(f"an item is of kind {number} and has {files} descriptors")
    return Kind(number)


def _unpack(record: Record) -> Client | Item | Ended | None:
    """An item; None if its descriptor is not a connection."""
    match record.kind:
        case Kind.CLIENT:
            return _client(record)
        case Kind.ITEM:
            return Item(record.state, record.files)
        case Kind.ENDED:
            return Ended()


def _client(record: Record) -> Client | None:
    first, *files = record.files
    try:
        sock = socket.socket(fileno=first)
    except OSError:
        for fd in record.files:
            os.close(fd)
        return None
    sock.setblocking(False)
    return Client(sock, record.state, _peer(sock), record.listener.decode(), tuple(files))


def _peer(sock: socket.socket) -> Any:
    with contextlib.suppress(OSError):
        return sock.getpeername()
    return None


def _counter() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def _value(fd: int) -> int:
    """The value of an eventfd(2), which is unchanged; 0 if it is none."""
    try:
        value = os.eventfd_read(fd)
    except OSError:
        return 0
    os.eventfd_write(fd, value)
    return value
