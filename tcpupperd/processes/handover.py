"""Packing live connections to send them to another process, and unpacking them.

Between two lines, a connection consists of its socket and a few bytes. They travel through a
channel, a pair of SOCK_SEQPACKET sockets that outlives the processes at its ends. A message
carries up to 252 sockets as SCM_RIGHTS (unix(7) allows 253 descriptors), and a memfd with their
state. So the message itself stays tiny, and the channel's buffer holds many connections, however
long their unfinished lines and unsent answers are.

The format has a version. If a newer or older program cannot read the state, it can still end the
connections cleanly, because the sockets arrive in any case. Nothing in a message is trusted: a
wrong one costs its own connections and nothing else, neither the worker nor its memory.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import BinaryIO, NamedTuple

from tcpupperd.serving.connection import State

VERSION = 1

#: Connections in a message: SCM_MAX_FD of the kernel, less the memfd.
BATCH = 252

#: The message: the name of the program, the version of the format, the number of connections.
_GREETING = struct.Struct("!10sHH")
_NAME = b"tcpupperd\0"
_FD = struct.Struct("i")

#: The record of a connection: address family, port, flags, lines answered, seconds since the last
#: activity, since an unfinished line began, and until lingering ends; the lengths of the host, the
#: unfinished line and the unsent answer, which follow.
_RECORD = struct.Struct("!HHBQdddHII")
_MID_LINE, _FINISHED, _EOF, _LINGERS = 1, 2, 4, 8
_FLAGS_ALL = _MID_LINE | _FINISHED | _EOF | _LINGERS

# Limits of the values in a record. Anything above is wrong and is not read.
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_LINES_MAX = 2**63 - 1  # the counter stops there
_HOST_MAX = 255  # bytes
_HELD_MAX = 2**30  # the highest max_line
_UNSENT_MAX = 2 * _HELD_MAX + 2**20  # an answer of that size, one to what was held, a few chunks
_TIME_MAX = 1e9  # three decades; deadlines cannot be computed from NaN or 1e308
_RECORD_MAX = _RECORD.size + _HOST_MAX + _HELD_MAX + _UNSENT_MAX


class HandoverError(Exception):
    """The state of some connections cannot be read; only their `sockets` are left."""

    def __init__(self, message: str, sockets: list[socket.socket]) -> None:
        super().__init__(message)
        self.sockets = sockets


class Connection(NamedTuple):
    """A connection in transit."""

    socket: socket.socket
    client_address: object
    state: State = State()


#: What a message says of a connection: address family, client's address, state.
Record = tuple[int, object, State]


def give(end: socket.socket, connections: Sequence[Connection]) -> None:
    """Put up to `BATCH` connections into a channel.

    Raises BlockingIOError if the channel is full, and OSError if too many descriptors are in
    flight (ETOOMANYREFS: the limit is RLIMIT_NOFILE of the sender).
    """
    state = os.memfd_create("tcpupperd-connections", os.MFD_CLOEXEC)
    try:
        with open(state, "wb", closefd=False) as file:
            for connection in connections:
                _pack(file, connection)
        files = [state, *(connection.socket.fileno() for connection in connections)]
        socket.send_fds(end, [_GREETING.pack(_NAME, VERSION, len(connections))], files)
    finally:
        os.close(state)


def peek(end: socket.socket) -> int:
    """The number of connections that the next message claims to have; 0 if its format is unknown.

    Raises BlockingIOError if there is no message.
    """
    data = end.recv(_GREETING.size, socket.MSG_PEEK)
    if len(data) < _GREETING.size:
        return 0
    _, _, count = _GREETING.unpack(data)
    return min(int(count), BATCH)


def take(end: socket.socket) -> list[Connection]:
    """Take the connections of one message out of a channel.

    Raises BlockingIOError if there is no message, EOFError if none can ever arrive, and
    HandoverError if it is not in the format of this version.
    """
    data, files, flags = _receive(end)
    if not data and not files:
        raise EOFError
    try:
        _check_greeting(data, len(files), flags)
        records = _read_all(files[0], len(files) - 1)
    except (ValueError, struct.error, OSError, MemoryError) as error:
        raise HandoverError(_reason(error), _as_sockets(files)) from None
    os.close(files[0])
    families = [family for family, _, _ in records]
    sockets = _as_sockets(files[1:], families)
    if [one.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) for one in sockets] != families:
        raise HandoverError("a descriptor is not the socket that it should be", sockets)
    return [
        Connection(one, address, state)
        for one, (_, address, state) in zip(sockets, records, strict=True)
    ]


def _receive(end: socket.socket) -> tuple[bytes, list[int], int]:
    """A message, its descriptors and flags. (`socket.recv_fds` does not set MSG_CMSG_CLOEXEC.)"""
    room = socket.CMSG_LEN((BATCH + 1) * _FD.size)
    data, ancillary, flags, _ = end.recvmsg(_GREETING.size + 1, room, socket.MSG_CMSG_CLOEXEC)
    files = [fd for *_, packed in ancillary for (fd,) in _FD.iter_unpack(packed)]
    return data, files, flags


def _check_greeting(data: bytes, files: int, flags: int) -> None:
    name, version, count = _GREETING.unpack(data)
    if name != _NAME or version != VERSION:
        raise ValueError(f"the format is {name!r} version {version}, not version {VERSION}")
    if flags & socket.MSG_CTRUNC or files != count + 1:
        raise ValueError(f"{count} connections came with {files - 1} sockets")


def _pack(file: BinaryIO, connection: Connection) -> None:
    _, address, state = connection
    host, port = address[:2] if isinstance(address, tuple) else ("", 0)
    name = os.fsencode(host)
    flags = (
        _MID_LINE * state.mid_line
        | _FINISHED * state.finished
        | _EOF * state.eof
        | _LINGERS * (state.lingers_for is not None)
    )
    sizes = len(name), len(state.held), len(state.unsent)
    times = state.idle_for, state.line_open_for, state.lingers_for or 0.0
    head = (connection.socket.family, port, flags, min(state.lines, _LINES_MAX))
    file.write(_RECORD.pack(*head, *times, *sizes))
    file.writelines((name, state.held, state.unsent))


def _read_all(state: int, count: int) -> list[Record]:
    """What a message says of each of its connections.

    They are read one by one, and each size is checked before that much is read: a sparse file can
    have any size without any data.
    """
    found = os.fstat(state)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("the state is not a file")
    if found.st_size > count * _RECORD_MAX:
        raise ValueError(f"{found.st_size} bytes are too many for {count} connections")
    with open(state, "rb", closefd=False) as file:
        file.seek(0)
        left, records = found.st_size, []
        for _ in range(count):
            record, left = _read(file, left)
            records.append(record)
    if left:
        raise ValueError(f"{left} bytes are left over")
    return records


def _read(file: BinaryIO, left: int) -> tuple[Record, int]:
    """The next record in a file with `left` bytes to read, and the number of bytes left after
    that."""
    head = file.read(_RECORD.size)
    if len(head) < _RECORD.size:
        raise ValueError("the state is cut short")
    family, port, flags, lines, *times, name_size, held_size, unsent_size = _RECORD.unpack(head)
    if family not in _FAMILIES or flags & ~_FLAGS_ALL or lines > _LINES_MAX:
        raise ValueError(f"family {family}, flags {flags}, {lines} lines: one of them is wrong")
    if not all(abs(time) < _TIME_MAX for time in times):
        raise ValueError("a time is out of range")
    if name_size > _HOST_MAX or held_size > _HELD_MAX or unsent_size > _UNSENT_MAX:
        sizes = f"host {name_size}, line {held_size}, answer {unsent_size} bytes"
        raise ValueError(f"{sizes}: one of them is too long")
    left -= _RECORD.size + name_size + held_size + unsent_size
    if left < 0:
        raise ValueError("the state is cut short")
    address = _address(family, file.read(name_size), port)
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
    )
    return (family, address, state), left


def _address(family: int, name: bytes, port: int) -> object:
    """The client's address; ValueError or OSError if the host does not belong to the family."""
    if family == socket.AF_UNIX:
        return ""
    host = os.fsdecode(name)
    socket.inet_pton(family, host.partition("%")[0])
    return host, port


def _reason(error: Exception) -> str:
    return "there is no memory for it" if isinstance(error, MemoryError) else str(error)


def _as_sockets(files: list[int], families: Iterable[int] = ()) -> list[socket.socket]:
    """The sockets among the descriptors, with the given families, or else as the kernel reports
    them; other descriptors are closed."""
    found = []
    for fd, family in zip_longest(files, families, fillvalue=-1):
        kind = -1 if family == -1 else socket.SOCK_STREAM  # asking the kernel takes longer
        try:
            found.append(socket.socket(family, kind, min(kind, 0), fd))
        except OSError:
            os.close(fd)
    return found
