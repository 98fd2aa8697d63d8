"""The ledger: what a worker knows about its connections, where its death does not erase it.

The kernel counts the bytes that were received from a TCP connection and sent to it, and an answer
is as long as its input. The difference, less an offset (for a PROXY header, or a greeting), is
what the client is owed, wherever the worker was killed. The ledger has these bytes: those of the
pass in progress, which receives into it, and those that were owed after the pass before. `audit`
puts them together. A pass receives once from a connection and answers.

It is shared memory, and at any instruction it is either right or says that it does not know: a
record is written next to the current one, and a single store makes it the current one. What a pass
has received needs no such care, because upper-casing twice is the same as once. Most passes leave
nothing, and then cost two stores.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from typing import Any, NamedTuple

from tcpupperd.host.tcp_info import counts
from tcpupperd.serving.fast_path import RECEIVE_SIZE

#: The numbers at the beginning: the pass in progress (its number in the upper half, the descriptor
#: in the lower one), and the bytes received in it; the listener that accepts, and the channel;
#: whether another process has sent the signal that killed the worker. `_fast_path.c` writes some.
_PASS, _RECEIVED, _LISTENER, _CHANNEL, _SENT = range(5)

#: In place of the bytes received: recv(2) has not returned; this pass receives nothing.
UNKNOWN, NOTHING = 2**64 - 1, 2**64 - 2
_NO_CONNECTION = 2**32 - 1

# The buffer for what a pass receives, and the rows: in C, too.
_DATA = 8192
_ROWS = _DATA + RECEIVE_SIZE

#: A row has four numbers: what is known (flags, and the number of the last pass in it), the lines
#: (with the number of the last pass that left nothing), the time at which the client connected.
_ROW = 4
_KNOWN, _RECORD, _SECOND, _OWES, _FACTS, _FAST = (1 << bit for bit in range(63, 57, -1))
_NUMBER = 2**32 - 1
_LINES_BITS = 40
_LINES = 2**_LINES_BITS - 1

#: A connection with more than a row has two records, one of which is current: offset, time of the
#: last activity, of the beginning of the incomplete line, of the end of lingering; lines; lengths
#: of the unsent answer, of what is held, and of the description; flags. These three follow.
_HEAD = struct.Struct("=qdddQIIHH")
_RECORD_SIZE = 128
_INLINE = _RECORD_SIZE - _HEAD.size
MID_LINE, FINISHED, EOF, LINGERS, RAW, _FAR, _PLACE, LOST = (1 << bit for bit in range(8))

#: If they are longer, they are in one of two places in the file.
_FAR_START, _FAR_STEP = 2**40, 2**32

#: Beyond so many bytes, what is not in use any more is given back to the system.
_SPARE_MAX = 2**22

#: No description is as long as this. A multiple of the size of a page.
_DESCRIPTION_MAX = 2**16

#: The most bytes that are noted of one connection. They take memory three times while they are
#: handed over, and what has made the kernel kill one worker must not make it kill the next.
NOTED_MAX = 2**24

#: The most connections that a ledger has room for.
SIZE_MAX = 2**20


class Entry(NamedTuple):
    """What the ledger says about a connection after the last pass that is in it."""

    offset: int = 0
    last_activity: float = 0.0
    line_began: float = 0.0
    lingers_until: float = 0.0
    lines: int = 0
    unsent: bytes = b""
    held: bytes = b""
    description: bytes = b""
    flags: int = 0


class _Head(NamedTuple):
    """The fixed part of a record."""

    offset: int
    last_activity: float
    line_began: float
    lingers_until: float
    lines: int
    unsent: int
    held: int
    words: int
    flags: int


class NoLedger:
    """Of a server without a keeper: it records nothing."""

    def use_channel(self, fd: int) -> None:
        """Connections are to be put into this channel."""

    def accepting(self, listener: int) -> None:
        """A connection is about to be accepted from this listener."""

    def add(self, connection: Any) -> None:
        """A new connection is served from now on."""

    def take(self, connection: Any) -> None:
        """A connection that was taken over is served from now on."""

    def begin(self, fd: int) -> None:
        """A pass that receives nothing."""

    def note(self, connection: Any) -> None:
        """The end of a pass, or a change outside of one."""

    def describe(self, connection: Any, unsent: bytes, held: bytes, *, raw: bool = False) -> None:
        """What is special about a connection, and what it is owed now. With `raw`, what is held
        has been received, but not processed."""

    def forget(self, fd: int) -> None:
        """A connection was closed."""


NO_LEDGER = NoLedger()


class Ledger(NoLedger):
    """The ledger of one worker, with room for the descriptors below `size`. Raises OSError."""

    def __init__(self, size: int) -> None:
        self.size = min(size, SIZE_MAX)
        self._records = _ROWS + self.size * _ROW * 8
        length = self._records + self.size * 2 * _RECORD_SIZE
        self._file = os.memfd_create("tcpupperd-ledger", os.MFD_CLOEXEC)
        os.ftruncate(self._file, _far(SIZE_MAX, 0))
        self._map = mmap.mmap(self._file, length)
        self.memory = memoryview(self._map)
        self._head = self.memory[:40].cast("Q")
        self._data = self.memory[_DATA:_ROWS]
        self._rows = self.memory[_ROWS : self._records].cast("Q")
        self._began = self.memory[_ROWS : self._records].cast("d")
        self._head[_PASS] = _NO_CONNECTION
        self._facts: dict[int, tuple[int, bytes]] = {}  # offset and description, if there are any
        self._far: dict[int, int] = {}  # the longest that a connection has had
        self._spare: dict[int, int] = {}  # the same, of those that have nothing there any more

    # In the worker

    def use_channel(self, fd: int) -> None:
        self._head[_CHANNEL] = fd

    def accepting(self, listener: int) -> None:
        self._head[_LISTENER] = listener

    def receive(self, fd: int, size: int = RECEIVE_SIZE) -> bytes:
        """Begin a pass and receive up to `size` bytes."""
        head = self._head
        self._begin(fd, UNKNOWN)
        try:
            size = os.readv(fd, (self._data[:size],))
        except OSError:
            head[_PASS] |= _NO_CONNECTION
            raise
        head[_RECEIVED] = size
        return bytes(self._data[:size])

    def begin(self, fd: int) -> None:
        self._begin(fd, NOTHING)

    def _begin(self, fd: int, received: int) -> None:
        head = self._head
        number = (head[_PASS] >> 32) + 1 & _NUMBER
        head[_PASS] |= _NO_CONNECTION
        head[_RECEIVED] = received
        head[_PASS] = number << 32 | fd

    def left_nothing(self, fd: int, lines: int) -> None:
        """The end of a pass over a connection that was owed nothing, and still is, with the number
        of lines that it answered."""
        at = _ROW * fd + 1
        if self._rows[at - 1] & _OWES:  # `note` will follow
            return
        self._end(fd, lines + self._rows[at])

    def _end(self, fd: int, lines: int) -> None:
        """The pass is complete, and the connection has had so many lines."""
        number = self._head[_PASS] >> 32
        self._rows[_ROW * fd + 1] = number << _LINES_BITS & 2**64 - 1 | lines & _LINES

    def add(self, connection: Any) -> None:
        protocol = connection.protocol
        if protocol.opening or protocol.service != "upper":
            self.describe(connection, protocol.opening, b"")
        else:
            self._add(connection)

    def take(self, connection: Any) -> None:
        protocol, unsent = connection.protocol, connection.unsent
        if (
            unsent
            or protocol.mid_line
            or protocol.finished
            or not _is_plain(connection)
            or offset_of(connection.socket, 0)
        ):
            self.describe(connection, unsent, protocol.left(connection.last_activity))
        else:
            self._add(connection)

    def _add(self, connection: Any) -> None:
        at = _ROW * connection.fd
        self._began[at + 2] = connection.began
        self._rows[at + 1] = connection.protocol.lines & _LINES
        self._rows[at] = _KNOWN | self._head[_PASS] >> 32

    def describe(self, connection: Any, unsent: bytes, held: bytes, *, raw: bool = False) -> None:
        fd = connection.fd
        self._began[_ROW * fd + 2] = connection.began
        offset = offset_of(connection.socket, len(unsent) + len(held))
        self._facts[fd] = offset, describe(connection)
        self._record(connection, unsent, held, RAW * raw)

    def note(self, connection: Any) -> None:
        fd, protocol, unsent = connection.fd, connection.protocol, connection.unsent
        held, number = protocol.held, self._head[_PASS] >> 32
        if held and not unsent and self._rows[_ROW * fd] & (_FAST | _NUMBER) == _FAST | number:
            return  # the fast path in C has noted it
        if protocol.finished or protocol.service != "upper":  # input may have been ignored
            self.describe(connection, unsent, protocol.left(connection.last_activity))
            return
        if unsent or held or protocol.mid_line:
            self._record(connection, unsent, held, 0)
            return
        self._settle(connection)
        self._end(fd, protocol.lines)

    def _settle(self, connection: Any) -> None:
        """Nothing is owed any more. Only the lines, which follow, make the pass complete: until
        then, what it has received is still needed to count them."""
        fd = connection.fd
        if not self._rows[_ROW * fd] & _OWES:
            return
        _, description = self._facts.get(fd, (0, b""))
        if description:  # it is next to what was owed, which may even be lost
            self._record(connection, b"", b"", 0)
        self._rows[_ROW * fd] &= ~(_OWES if description else _OWES | _RECORD)
        if len(description) > _INLINE:
            self._shorten(fd)
        elif fd in self._far:
            self._give_back(fd)

    def forget(self, fd: int) -> None:
        self._rows[_ROW * fd] = 0
        self._facts.pop(fd, None)
        if fd in self._far:
            self._give_back(fd)

    def _record(self, connection: Any, unsent: Any, held: Any, flags: int) -> None:
        """Write a record next to the current one, and make it the current one."""
        fd, protocol = connection.fd, connection.protocol
        offset, words = self._facts.get(fd, (0, b""))
        before = self._rows[_ROW * fd]
        second = ~before & _SECOND
        at = self._record_at(fd, second)
        flags |= (
            MID_LINE * protocol.mid_line
            | FINISHED * protocol.finished
            | EOF * connection.eof
            | LINGERS * (connection.lingers_until > 0)
        )
        size = len(words) + len(unsent) + len(held)
        if size <= _INLINE:
            self.memory[at + _HEAD.size : at + _HEAD.size + size] = b"".join((words, unsent, held))
        else:
            flags |= self._write_far(fd, before, (words, unsent, held), protocol.lines)
        times = connection.last_activity, connection.line_began, connection.lingers_until
        sizes = len(unsent), len(held), len(words)
        _HEAD.pack_into(self.memory, at, offset, *times, protocol.lines, *sizes, flags)
        number = self._head[_PASS] >> 32
        facts = _FACTS if fd in self._facts else 0
        self._rows[_ROW * fd] = _KNOWN | _RECORD | _OWES | facts | second | number
        self._end(fd, protocol.lines)

    def _record_at(self, fd: int, number: int) -> int:
        return self._records + (2 * fd + bool(number & _SECOND)) * _RECORD_SIZE

    def _write_far(self, fd: int, before: int, parts: tuple[Any, Any, Any], lines: int) -> int:
        """Write what is too long for a record; return the flags that say where it is. If a line
        only became longer, the rest is appended."""
        words, unsent, held = parts
        size = len(words) + len(unsent) + len(held)
        if size > NOTED_MAX:
            return LOST
        place = start = 0
        if before & _OWES:
            old = self._read_head(fd, before)
            place = not old.flags & _PLACE
            same = (old.lines, old.unsent, old.words) == (lines, 0, len(words))
            if same and old.flags & _FAR and not unsent and len(held) >= old.held:
                place, start = not place, len(words) + old.held
        if start:
            parts = (b"", b"", memoryview(held)[start - len(words) :])
        try:
            os.pwritev(self._file, parts, _far(fd, place) + start)
        except OSError:  # no memory
            return LOST
        self._far[fd] = max(self._far.get(fd, 0), self._spare.pop(fd, 0), size)
        return _FAR | _PLACE * bool(place)

    def _give_back(self, fd: int) -> None:
        """Give memory back, but not each time, because that takes as long as a line."""
        self._spare[fd] = max(self._far.pop(fd), mmap.PAGESIZE)
        if 2 * sum(self._spare.values()) < _SPARE_MAX:
            return
        for spare, size in self._spare.items():
            self._remove(spare, 0, size)
        self._spare.clear()

    def _shorten(self, fd: int) -> None:
        """Give memory back, except that of the description."""
        size = self._far.get(fd, 0)
        if size > _DESCRIPTION_MAX:
            self._remove(fd, _DESCRIPTION_MAX, size)
            self._far[fd] = _DESCRIPTION_MAX

    def _remove(self, fd: int, start: int, end: int) -> None:
        for place in (0, 1):
            with mmap.mmap(self._file, end - start, offset=_far(fd, place) + start) as view:
                view.madvise(mmap.MADV_REMOVE)

    # In its keeper, once the worker is dead

    @property
    def channel(self) -> int:
        """The sending end of the channel."""
        return int(self._head[_CHANNEL])

    @property
    def listener(self) -> int:
        """The listener from which a connection was accepted last."""
        return int(self._head[_LISTENER])

    @property
    def killed_from_outside(self) -> bool:
        """Whether the worker died of a signal that another process has sent, although the kernel
        also sends it for faults. Without the C module, this is not known."""
        return bool(self._head[_SENT])

    def knows(self, fd: int) -> bool:
        """Whether this is a connection that was served."""
        return fd < self.size and bool(self._rows[_ROW * fd] & _KNOWN)

    def owes(self, fd: int) -> bool:
        """Whether any bytes were owed after the last pass that was noted."""
        number = self._rows[_ROW * fd] if self.knows(fd) else 0
        if not number & _OWES:
            return False
        head = self._read_head(fd, number)
        return head.unsent + head.held > 0

    def in_progress(self, fd: int) -> bool:
        """Whether a pass over this connection was not complete."""
        current = self._head[_PASS]
        number, ended = current >> 32, self._rows[_ROW * fd + 1] >> _LINES_BITS
        was_noted = self._rows[_ROW * fd] & _NUMBER == number
        return current & _NUMBER == fd and not was_noted and ended != number & 2**24 - 1

    @property
    def has_received_nothing(self) -> bool:
        """Whether the pass in progress has met the end of file, or does not receive at all."""
        return self._head[_RECEIVED] in (0, NOTHING)

    def received(self, left: int | None) -> bytes | None:
        """What the pass in progress has received; None for the end of file. `left` is the number
        of bytes that the kernel says it has, if the worker had not noted it. Raises ValueError if
        nobody knows."""
        size = self._head[_RECEIVED]
        if size == NOTHING or (size == UNKNOWN and left == 0):
            return b""
        if size == UNKNOWN:
            size = -1 if left is None else left
        if not 0 <= size <= RECEIVE_SIZE:
            raise ValueError("it is not known what it has sent")
        return bytes(self._data[:size]) if size else None

    def entry(self, fd: int) -> Entry:
        """What was noted about a connection. Raises ValueError if it cannot be right."""
        number = self._rows[_ROW * fd]
        lines = self._rows[_ROW * fd + 1] & _LINES
        if not number & _RECORD:
            return Entry(lines=lines)
        head = self._read_head(fd, number)
        sizes = (head.words, head.unsent, head.held) if number & _OWES else (head.words, 0, 0)
        words, unsent, held = self._read_body(fd, number, head.flags, sizes)
        return Entry(
            offset=head.offset,
            last_activity=head.last_activity,
            line_began=head.line_began,
            lingers_until=head.lingers_until,
            lines=max(lines, head.lines),
            unsent=unsent,
            held=held,
            description=words,
            flags=head.flags if number & _OWES else 0,
        )

    def began(self, fd: int) -> float:
        """The time at which the client connected."""
        return float(self._began[_ROW * fd + 2])

    def _read_head(self, fd: int, number: int) -> _Head:
        return _Head(*_HEAD.unpack_from(self.memory, self._record_at(fd, number)))

    def _read_body(
        self, fd: int, number: int, flags: int, sizes: tuple[int, int, int]
    ) -> tuple[bytes, bytes, bytes]:
        if flags & LOST:
            raise ValueError("there was too much, or no memory, to note what it is owed")
        if flags & _FAR:
            body = os.pread(self._file, sum(sizes), _far(fd, bool(flags & _PLACE)))
        else:
            at = self._record_at(fd, number) + _HEAD.size
            body = bytes(self.memory[at : at + min(sum(sizes), _INLINE)])
        if len(body) < sum(sizes):
            raise ValueError("the ledger has less than it says")
        words, unsent, _ = sizes
        return body[:words], body[words : words + unsent], body[words + unsent :]


def _far(fd: int, place: int) -> int:
    """The place in the file for what is too long for a record."""
    return _FAR_START + (2 * fd + place) * _FAR_STEP


def offset_of(one: socket.socket, owed: int) -> int:
    """The offset of a connection that is owed so many bytes."""
    try:
        found = counts(one)
    except OSError:  # a Unix socket, or one that has failed
        return 0
    return found.consumed - found.written - owed


def _is_plain(connection: Any) -> bool:
    """Whether all that is to be said about a connection follows from its socket."""
    service, words = connection.protocol.service, connection.introduction or connection.reason
    address = connection.client_address
    if service != "upper" or words or connection.socket.family == socket.AF_UNIX:
        return service == "upper" and not words and address == ""
    try:
        return bool(address) and connection.socket.getpeername()[:2] == address[:2]
    except OSError:  # it has failed
        return False


def describe(connection: Any) -> bytes:
    """What `described` reads."""
    address = connection.client_address
    host, port = address[:2] if isinstance(address, tuple) else ("", 0)
    words = [connection.protocol.service, connection.reason, host, str(port)]
    words += [f"{name} {text}" for name, text in connection.introduction.items()]
    return "\n".join(words).encode()
