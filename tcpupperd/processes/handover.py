"""Live connections, packed to go from one process to another, and unpacked.

A connection between two lines is its socket and otherwise a few bytes. They travel through a
channel, a pair of SOCK_SEQPACKET sockets that outlives the processes at its ends: a message takes
up to 252 sockets by SCM_RIGHTS (unix(7) allows 253 descriptors), and one memfd with all that is
known of them. So the message itself stays tiny, and however many connections wait in the channel
they never fill its buffer, whatever they had half sent and half received.

The format has a version. What a newer or an older program cannot read it can still end politely,
for the sockets arrive all the same. Nothing in a message is believed: a wrong one must cost its
own connections and nothing else, neither the worker nor its memory.
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

#: Of the message: who speaks, the format's version, how many connections.
_GREETING = struct.Struct("!10sHH")
_NAME = b"tcpupperd\0"
_FD = struct.Struct("i")

#: Of a connection: address family, port, flags, lines answered, seconds since bytes moved, since
#: an unfinished line began, and until lingering ends; lengths of host, unfinished line and unsent
#: answer, which follow.
_RECORD = struct.Struct("!HHBQdddHII")
_MID_LINE, _FINISHED, _EOF, _LINGERS = 1, 2, 4, 8
_FLAGS_ALL = _MID_LINE | _FINISHED | _EOF | _LINGERS

# What a record may say. Anything above is wrong, and is not read.
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_LINES_MAX = 2**63 - 1  # where it stays
_HOST_MAX = 255  # bytes
_HELD_MAX = 2**30  # the highest max_line
_UNSENT_MAX = 2 * _HELD_MAX + 2**20  # an answer of that size, one to what was held, a few chunks
_TIME_MAX = 1e9  # three decades; deadlines cannot be reckoned with NaN or 1e308
_RECORD_MAX = _RECORD.size + _HOST_MAX + _HELD_MAX + _UNSENT_MAX


class HandoverError(Exception):
    """The state of some connections cannot be read; `sockets` are all that is left of them."""

    def __init__(self, message: str, sockets: list[socket.socket]) -> None:
        super().__init__(message)
        self.sockets = sockets


class Connection(NamedTuple):
    """A connection as it travels."""

    socket: socket.socket
    client_address: object
    state: State = State()


#: What a message says of a connection: address family, client's address, state.
Record = tuple[int, object, State]


def give(end: socket.socket, connections: Sequence[Connection]) -> None:
    """Put up to `BATCH` connections into a channel.

    Raises BlockingIOError if it is full, and OSError if the kernel takes no more descriptors in
    flight (ETOOMANYREFS: as many as RLIMIT_NOFILE of the sender).
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
    """How many connections the next message says it has; 0 if it says nothing that is known.

    Raises BlockingIOError if there is none.
    """
    data = end.recv(_GREETING.size, socket.MSG_PEEK)
    if len(data) < _GREETING.size:
        return 0
    _, _, count = _GREETING.unpack(data)
    return min(int(count), BATCH)


def take(end: socket.socket) -> list[Connection]:
    """Take one message's connections out of a channel.

    Raises BlockingIOError if there is none, EOFError if none can ever come, and HandoverError if
    it is not in this version's format.
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
    """A message, its descriptors and flags; `socket.recv_fds` would ignore MSG_CMSG_CLOEXEC."""
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

    They are read one by one, and no size is read before it is known to be possible: a file can
    be of any size without having a byte.
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
    """The next record of a file of which so many bytes are `left`, and how many are then."""
    head = file.read(_RECORD.size)
    if len(head) < _RECORD.size:
        raise ValueError("the state is cut short")
    family, port, flags, lines, *times, name_size, held_size, unsent_size = _RECORD.unpack(head)
    if family not in _FAMILIES or flags & ~_FLAGS_ALL or lines > _LINES_MAX:
        raise ValueError(f"family {family}, flags {flags}, {lines} lines: one of them cannot be")
    if not all(abs(time) < _TIME_MAX for time in times):
        raise ValueError("a time is out of range")
    if name_size > _HOST_MAX or held_size > _HELD_MAX or unsent_size > _UNSENT_MAX:
        raise ValueError(f"a host, a line, an answer of {name_size}, {held_size}, {unsent_size}")
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
    """The client's address; ValueError or OSError if the host is none of the family's."""
    if family == socket.AF_UNIX:
        return ""
    host = os.fsdecode(name)
    socket.inet_pton(family, host.partition("%")[0])
    return host, port


def _reason(error: Exception) -> str:
    return "there is no memory for it" if isinstance(error, MemoryError) else str(error)


def _as_sockets(files: list[int], families: Iterable[int] = ()) -> list[socket.socket]:
    """Those of the descriptors that are sockets, of families as told or else as the kernel says;
    the rest are closed."""
    found = []
    for fd, family in zip_longest(files, families, fillvalue=-1):
        kind = -1 if family == -1 else socket.SOCK_STREAM  # not asked for: that takes longer
        try:
            found.append(socket.socket(family, kind, min(kind, 0), fd))
        except OSError:
            os.close(fd)
    return found
