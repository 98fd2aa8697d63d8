"""Live connections, packed to go from one process to another, and unpacked.

A connection between two lines is its socket and otherwise a few bytes. They travel through a
channel, a pair of SOCK_SEQPACKET sockets that outlives the processes at its ends: a message takes
up to 252 sockets by SCM_RIGHTS (unix(7) allows 253 descriptors), and one memfd with all that is
known of them. So the message itself stays tiny, and however many connections wait in the channel
they never fill its buffer, whatever they had half sent and half received.

The format has a version. What a newer or an older program cannot read it can still end politely,
for the sockets arrive all the same.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

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
_TIME_MAX = 1e9  # three decades; deadlines cannot be reckoned with NaN or 1e308


class HandoverError(Exception):
    """The state of some connections cannot be read; `sockets` are all that is left of them."""

    def __init__(self, message: str, sockets: list[socket.socket]) -> None:
        super().__init__(message)
        self.sockets = sockets


class Connection(NamedTuple):
    """A connection as it travels. Times are relative, in seconds, because the clocks of two
    processes need not agree (a time namespace, a restored container)."""

    socket: socket.socket
    client_address: object
    lines: int = 0
    held: bytes = b""  # of an unfinished line
    unsent: bytes = b""
    mid_line: bool = False
    finished: bool = False
    eof: bool = False
    idle_for: float = 0.0
    line_open_for: float = 0.0
    lingers_for: float | None = None


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
        with open(files[0], "rb", closefd=False) as file:
            file.seek(0)
            state = file.read()
        found = _unpack_all(state, files[1:])
    except (ValueError, struct.error, OSError) as error:
        raise HandoverError(str(error), _as_sockets(files)) from None
    os.close(files[0])
    return found


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
    address = connection.client_address
    host, port = address[:2] if isinstance(address, tuple) else ("", 0)
    name = os.fsencode(host)
    flags = (
        _MID_LINE * connection.mid_line
        | _FINISHED * connection.finished
        | _EOF * connection.eof
        | _LINGERS * (connection.lingers_for is not None)
    )
    sizes = len(name), len(connection.held), len(connection.unsent)
    times = connection.idle_for, connection.line_open_for, connection.lingers_for or 0.0
    head = (connection.socket.family, port, flags, connection.lines)
    file.write(_RECORD.pack(*head, *times, *sizes))
    file.writelines((name, connection.held, connection.unsent))


def _unpack_all(state: bytes, files: list[int]) -> list[Connection]:
    """The connections of a message; the sockets are made last, when nothing can fail any more."""
    found = []
    offset = 0
    for _ in files:
        family, fields, offset = _unpack(state, offset)
        found.append((family, fields))
    if offset != len(state):
        raise ValueError(f"{len(state) - offset} bytes are left over")
    if not all(stat.S_ISSOCK(os.fstat(fd).st_mode) for fd in files):
        raise ValueError("a descriptor is not a socket")
    return [
        Connection(socket.socket(family, socket.SOCK_STREAM, 0, fd), **fields)
        for fd, (family, fields) in zip(files, found, strict=True)
    ]


def _unpack(state: bytes, offset: int) -> tuple[int, dict[str, Any], int]:
    """The address family and the fields of the connection at `offset`, and the next's offset."""
    family, port, flags, lines, *times, name_size, held_size, unsent_size = _RECORD.unpack_from(
        state, offset
    )
    held_at = offset + _RECORD.size + name_size
    unsent_at = held_at + held_size
    end = unsent_at + unsent_size
    if end > len(state):
        raise ValueError("the state is cut short")
    if not all(abs(time) < _TIME_MAX for time in times):
        raise ValueError("a time is out of range")
    host = os.fsdecode(state[held_at - name_size : held_at])
    fields = {
        "client_address": "" if family == socket.AF_UNIX else (host, port),
        "lines": lines,
        "held": state[held_at:unsent_at],
        "unsent": state[unsent_at:end],
        "mid_line": bool(flags & _MID_LINE),
        "finished": bool(flags & _FINISHED),
        "eof": bool(flags & _EOF),
        "idle_for": times[0],
        "line_open_for": times[1],
        "lingers_for": times[2] if flags & _LINGERS else None,
    }
    return family, fields, end


def _as_sockets(files: list[int]) -> list[socket.socket]:
    """Those of the descriptors that are sockets; the rest are closed."""
    found = []
    for fd in files:
        try:
            found.append(socket.socket(fileno=fd))
        except OSError:
            os.close(fd)
    return found
