"""Packing live connections to send them to another process, and unpacking them.

Between lines, a connection consists of its socket and a few bytes: a record in the state of a
message. Messages are not trusted: a malformed one costs only its own connections, never the worker
or its memory.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import BinaryIO, NamedTuple

from outlive import channel
from tcpupperd.address import connectable
from tcpupperd.serving.connection import State
from tcpupperd.settings import INTRODUCED

#: tcpupperd 0.1.0, which had no services, used version 1.
VERSION = 2

#: The format of the messages in the channel.
FORMAT = channel.Format(b"tcpupperd", VERSION, earlier=(1,))

#: The record of a connection: address family of the socket, port of the client, flags, lines
#: answered, seconds since the last activity, since an incomplete line began, and until lingering
#: ends; the lengths of the client's host, the incomplete line, the unsent answer and the name of
#: the service, which follow; seconds since the client connected; the length of the reason why the
#: connection ended, which follows the service, and of its introduction, which follows the reason.
_RECORD = struct.Struct("!HHBQdddHIIBdBH")
_RECORDS = {1: struct.Struct("!HHBQdddHII"), 2: _RECORD}
_MID_LINE, _FINISHED, _EOF, _LINGERS = 1, 2, 4, 8
_FLAGS_ALL = _MID_LINE | _FINISHED | _EOF | _LINGERS

# Limits on the values in a record. Anything larger is invalid and is not read.
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_LINES_MAX = 2**63 - 1  # the counter saturates there
_HOST_MAX = 255  # bytes
_INTRODUCTION_MAX = 2**16 - 1  # bytes
_TIME_MAX = 1e9  # three decades; deadlines cannot be computed from NaN or 1e308


class RecordFormat(NamedTuple):
    """The format of the record of a connection: its fixed part, and the largest sizes of the
    others, in bytes."""

    fixed: struct.Struct
    held: int
    unsent: int

    @classmethod
    def of(cls, version: int, max_line: int) -> RecordFormat:
        """The sizes that follow from the largest `max_line` with which a connection may have been
        served. Anything other than a line is short: an HTTP request, or a PROXY header."""
        held = max_line + 2**16
        # An answer of that size, an answer to what was buffered, and a few chunks or a metrics
        # page.
        return cls(_RECORDS[version], held, 2 * held + 2**20)

    @property
    def longest(self) -> int:
        """The length of the longest record."""
        return self.fixed.size + _HOST_MAX + self.held + self.unsent + 2 * 255 + _INTRODUCTION_MAX


class Connection(NamedTuple):
    """A connection in flight."""

    socket: socket.socket
    client_address: object
    state: State = State()


#: A connection as encoded in a message: address family, client address, state.
Record = tuple[int, object, State]


def send(
    end: socket.socket,
    connections: Sequence[Connection],
    notes: channel.Notes = channel.NO_NOTES,
) -> None:
    """Put up to `BATCH` connections into a channel; raises what `channel.send` raises."""

    def write(file: BinaryIO) -> None:
        for connection in connections:
            _pack(file, connection)

    channel.send(end, FORMAT, [connection.socket for connection in connections], write, notes)


def receive(
    end: socket.socket, max_line: int, notes: channel.Notes = channel.NO_NOTES
) -> list[Connection]:
    """Take the connections of one message out of a channel; `max_line` is the largest with which
    any of them may have been served. There are none if the message was withdrawn. Raises what
    `channel.receive` raises otherwise, and HandoverError if the state of a connection is
    invalid."""
    try:
        message = channel.receive(end, FORMAT, notes)
    except channel.Withdrawn:
        return []
    return _connections(message, partial(_read_all, RecordFormat.of(message.version, max_line)))


def recover(state: int, descriptors: Sequence[int], max_line: int) -> list[Connection]:
    """The connections of a message whose receiver was killed, from the descriptors of its state
    and of the connections. Raises HandoverError if the state of a connection is invalid."""
    message = channel.Message(VERSION, state, list(descriptors), channel.NO_NOTES)
    return _connections(message, partial(_read_any, max_line))


def _connections(
    message: channel.Message, read: Callable[[BinaryIO, int, int], list[Record]]
) -> list[Connection]:
    records = message.read(read)
    sockets = message.sockets([family for family, _, _ in records])
    return [
        Connection(one, address, state)
        for one, (_, address, state) in zip(sockets, records, strict=True)
    ]


def _read_any(max_line: int, file: BinaryIO, size: int, count: int) -> list[Record]:
    """The records of the connections in a message of unknown version."""
    try:
        return _read_all(RecordFormat.of(VERSION, max_line), file, size, count)
    except ValueError:
        file.seek(0)
        return _read_all(RecordFormat.of(1, max_line), file, size, count)


def _pack(file: BinaryIO, connection: Connection) -> None:
    _, address, state = connection
    host, port = connectable(address) if isinstance(address, tuple) else ("", 0)
    name, service, reason = os.fsencode(host), state.service.encode(), state.reason.encode()
    introduction = "\n".join(f"{key} {text}" for key, text in state.introduction.items()).encode()
    flags = (
        _MID_LINE * state.mid_line
        | _FINISHED * state.finished
        | _EOF * state.eof
        | _LINGERS * (state.lingers_for is not None)
    )
    sizes = len(name), len(state.held), len(state.unsent), len(service)
    times = state.idle_for, state.line_open_for, state.lingers_for or 0.0
    head = (connection.socket.family, port, flags, min(state.lines, _LINES_MAX))
    file.write(_RECORD.pack(*head, *times, *sizes, state.open_for, len(reason), len(introduction)))
    file.writelines((name, state.held, state.unsent, service, reason, introduction))


def _read_all(form: RecordFormat, file: BinaryIO, size: int, count: int) -> list[Record]:
    """The records of the connections in a message.

    They are read one by one, and each size is checked before that much is read.
    """
    if size > count * form.longest:
        raise ValueError(f"{size} bytes are too many for {count} connections")
    left, records = size, []
    for _ in range(count):
        record, left = _read(form, file, left)
        records.append(record)
    if left:
        raise ValueError(f"{left} unexpected bytes at the end")
    return records


def _read(form: RecordFormat, file: BinaryIO, left: int) -> tuple[Record, int]:
    """The next record in a file with `left` bytes to read, and the number of bytes left after
    it."""
    head = file.read(form.fixed.size)
    if len(head) < form.fixed.size:
        raise ValueError("the state is truncated")
    family, port, flags, lines, *rest = form.fixed.unpack(head)
    times, (name_size, held_size, unsent_size, *later) = rest[:3], rest[3:]
    service_size, open_for, reason_size, introduction_size = later or (0, 0.0, 0, 0)
    if family not in _FAMILIES or flags & ~_FLAGS_ALL or lines > _LINES_MAX:
        raise ValueError(
            f"family {family}, flags {flags}, {lines} lines: at least one of these is out of range"
        )
    if not all(abs(time) < _TIME_MAX for time in (*times, open_for)):
        raise ValueError("a time is out of range")
    if name_size > _HOST_MAX or held_size > form.held or unsent_size > form.unsent:
        sizes = f"host {name_size}, line {held_size}, answer {unsent_size} bytes"
        raise ValueError(f"{sizes}: at least one of these is too long")
    left -= form.fixed.size + name_size + held_size + unsent_size + service_size + reason_size
    left -= introduction_size
    if left < 0:
        raise ValueError("the state is truncated")
    address = _address(file.read(name_size), port)
    state = State(
        lines=lines,
        held=file.read(held_size),
        unsent=file.read(unsent_size),
        mid_line=bool(flags & _MID_LINE),
        finished=bool(flags & _FINISHED),
        eof=bool(flags & _EOF),
        idle_for=times[0],
        line_open_for=times[1],
        lingers_for=times[2] if flags & _LINGERS else None,
        service=file.read(service_size).decode() if later else "upper",
        open_for=open_for,
        reason=file.read(reason_size).decode(),
        introduction=_introduction(file.read(introduction_size).decode()),
    )
    return (family, address, state), left


def _introduction(text: str) -> dict[str, str]:
    """An introduction, of which only known names and harmless texts are kept."""
    pairs = (line.partition(" ") for line in text.split("\n"))
    return {name: value for name, _, value in pairs if name in INTRODUCED and value.isprintable()}


def _address(name: bytes, port: int) -> object:
    """The client's address; raises ValueError or OSError if the host is not a valid address. Its
    family may differ from the socket's, because it may come from a PROXY header."""
    if not name:
        return ""
    host = os.fsdecode(name)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.inet_pton(family, host.partition("%")[0])
    return host, port
