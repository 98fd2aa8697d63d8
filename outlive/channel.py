"""The handover channel: it passes live connections and can outlive the processes at its ends.

It is a pair of SOCK_SEQPACKET sockets. An exiting process puts its connections into one end, and
another process takes them out of the other. The service manager keeps both ends, so the other
process may be the next run of the same service (docs/handover.md).

A message carries up to 252 sockets as SCM_RIGHTS (unix(7) allows 253 descriptors), and a memfd
with the service's state for them. This keeps the message itself tiny, and the channel's buffer
holds many connections, however long their state is. Where no memfd can be written (RLIMIT_FSIZE),
a socket carries the state, up to the size of its buffer.

A message names its format. A program that cannot read the state can still close the connections
cleanly, because the sockets arrive in any case. Messages are not trusted: a malformed one costs
only its own connections.

A message has one owner, even if a process is killed while it is sending or receiving it: `owner`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from io import BytesIO
from itertools import zip_longest
from typing import BinaryIO, NamedTuple, TypeVar

from outlive.descriptors import HasFileno
from outlive.notify import Notifier

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The names of the ends in the service manager's store, which every version must find.
SEND_END, RECEIVE_END = "handover-give", "handover-take"
NAMES = frozenset({SEND_END, RECEIVE_END})

#: Bytes to request for the channel's buffer, up to net.core.wmem_max. With the default of 208 KiB,
#: the channel is full after 278 messages.
BUFFER = 2**22

#: Connections in a message: the kernel's SCM_MAX_FD, minus one for the memfd.
BATCH = 252

#: The message: the name of the program, the version of the format, the number of connections.
GREETING = struct.Struct("!10sHH")
NAME_MAX, VERSION_MAX = 10, 2**16 - 1
_FD = struct.Struct("i")

#: More messages than a channel can hold.
MESSAGES_MAX = 2 * BUFFER // 512

#: Of socket(7); Python has no name for it.
SO_DETACH_FILTER = 27


class _Format(NamedTuple):
    program: bytes
    version: int
    earlier: tuple[int, ...] = ()  # other versions that can be read


class Format(_Format):
    """The format of the state in a message: a program's name, 1 to 10 bytes, and a version, up to
    65535. Raises ValueError for anything else: a message would contain only a part of it."""

    __slots__ = ()

    def __new__(cls, program: bytes, version: int, earlier: tuple[int, ...] = ()) -> Format:
        if not 1 <= len(program) <= NAME_MAX or b"\0" in program:
            raise ValueError(f"the name {program!r} must have 1 to {NAME_MAX} bytes, and no NUL")
        for number in (version, *earlier):
            if not 0 <= number <= VERSION_MAX:
                raise ValueError(f"version {number} must be from 0 to {VERSION_MAX}")
        return super().__new__(cls, program, version, earlier)

    @property
    def file_name(self) -> str:
        """The name of the memfd with the state, which /proc shows."""
        return f"{self.program.decode()}-connections"


class Owner(IntEnum):
    """The side of a channel that owns the connections in a message. The value is the seal of the
    message's memfd that says so (fcntl(2)); nothing else ever changes the size of that file."""

    SENDER = fcntl.F_SEAL_GROW  # it has withdrawn the message, in the channel or not
    RECEIVER = fcntl.F_SEAL_SHRINK


class Withdrawn(Exception):  # noqa: N818 (it is not an error)
    """The sender owns the connections in a message, and will send them again."""


class Notes:
    """Notes about the message that a process is sending or receiving. These are none;
    `tcpupperd.host.in_flight` has some that survive the process."""

    def sending(self, state: int, connections: Sequence[int]) -> None:
        """A message with this state and these connections is about to be sent."""

    def sent(self) -> None:
        """It was sent."""

    def receiving(self) -> None:
        """A message is about to be received."""

    def received(self, state: int, connections: Sequence[int]) -> None:
        """It was received, with this state and these connections."""

    def withdrawn(self) -> None:
        """It was received, but its sender owns the connections: they are about to be closed."""

    def close_state(self, state: int) -> None:
        """The state was read: close it, at the latest when `done`."""
        os.close(state)

    def done(self) -> None:
        """The connections were closed, or are served, or there was no message."""


NO_NOTES = Notes()


class HandoverError(Exception):
    """The state of some connections cannot be read; only their `sockets` are left."""

    def __init__(self, message: str, sockets: list[socket.socket]) -> None:
        super().__init__(message)
        self.sockets = sockets


class Channel(NamedTuple):
    """The sending and the receiving end of a channel. All processes of the daemon share them, and
    if the service manager also keeps them, the channel outlives the daemon."""

    send_end: socket.socket
    receive_end: socket.socket
    outlives_us: bool


def open_channel(stored: dict[str, socket.socket], notifier: Notifier, *, store: bool) -> Channel:
    """The channel that the service manager has `stored`, or else a new one.

    With `store`, a new one is stored in the service manager. A channel that works is never
    replaced, because connections may be waiting in it.
    """
    if stored.keys() == NAMES:
        channel = Channel(stored[SEND_END], stored[RECEIVE_END], True)
        if _works(channel):
            return channel
        log.error("the stored handover channel does not work; using a new one")
        return replaced(channel, notifier)
    for name, end in stored.items():
        log.warning("closing the stored socket %s, which cannot be used", name)
        end.close()
        notifier.remove_descriptor(name)
    return _new_channel(notifier, store=store)


def replaced(old: Channel, notifier: Notifier) -> Channel:
    """A new channel in place of one that does not work, with the messages that are still there."""
    if old.outlives_us:
        for name in NAMES:
            notifier.remove_descriptor(name)
    new = _new_channel(notifier, store=old.outlives_us)
    _move(old, new)
    old.send_end.close()
    old.receive_end.close()
    return new


def is_shut_down(channel: Channel) -> bool:
    """Whether a process has called shutdown(2) for an end. The daemon never does, but all
    processes share the ends, and an attacker in a worker may do it."""
    return any(_polled(end, select.POLLRDHUP) for end in (channel.send_end, channel.receive_end))


def _new_channel(notifier: Notifier, *, store: bool) -> Channel:
    """A new channel. If it cannot be sent to the service manager, it ends with the daemon."""
    send_end, receive_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stored = (
        store
        and notifier.store_descriptor(SEND_END, send_end.fileno())
        and notifier.store_descriptor(RECEIVE_END, receive_end.fileno())
    )
    channel = Channel(send_end, receive_end, stored)
    _prepare(channel)
    return channel


def _prepare(channel: Channel) -> None:
    """Set the options of a channel, whatever another process has set. Raises OSError if there is
    a filter that drops messages and cannot be removed."""
    channel.send_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    for end in (channel.send_end, channel.receive_end):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        with contextlib.suppress(FileNotFoundError):  # there is none
            end.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def _works(channel: Channel) -> bool:
    """Whether what is put into one end comes out of the other."""
    try:
        _prepare(channel)
        if is_shut_down(channel):
            return False
        return _polled(channel.receive_end, select.POLLIN) or _carries(channel)
    except OSError:
        return False


def _carries(channel: Channel) -> bool:
    """Whether an empty channel carries a message."""
    probe = os.urandom(GREETING.size)
    _send_message(channel.send_end, probe, [])
    data, files, _ = _receive_message(channel.receive_end)
    for fd in files:
        os.close(fd)
    return data == probe


def _move(old: Channel, new: Channel) -> None:
    """Move the messages of a channel to another one, as far as that is possible."""
    with contextlib.suppress(OSError):
        for _ in range(MESSAGES_MAX):
            data, files, _ = _receive_message(old.receive_end)
            if not data and not files:  # the end
                break
            try:
                _send_message(new.send_end, data, files)
            finally:
                for fd in files:
                    os.close(fd)


def _polled(end: socket.socket, event: int) -> bool:
    """Whether poll(2) reports an event."""
    poll = select.poll()
    poll.register(end, event)
    return any(events & event for _, events in poll.poll(0))


def is_end(fd: int) -> bool:
    """Whether a descriptor can be an end of a channel."""
    try:
        one = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        one.getpeername()
        return one.type == socket.SOCK_SEQPACKET and one.family == socket.AF_UNIX
    except OSError:
        return False
    finally:
        one.detach()


def send(
    end: socket.socket,
    form: Format,
    sockets: Sequence[HasFileno],
    write: Callable[[BinaryIO], object],
    notes: Notes = NO_NOTES,
) -> None:
    """Put up to `BATCH` connections into a channel; `write` writes their state to a file. It is
    called again, with another file, if the first one cannot be written.

    The sockets stay open here: close them, but do not shut them down, and then the notes are
    `done`. Raises BlockingIOError if the channel is full, and OSError if too many descriptors are
    in flight (ETOOMANYREFS: the limit is the sender's RLIMIT_NOFILE), or if the state cannot be
    stored anywhere.
    """
    try:
        state = _in_file(form.file_name, write)
    except OSError as error:
        state = _in_socket(write, error)
    try:
        connections = [one.fileno() for one in sockets]
        greeting = GREETING.pack(form.program, form.version, len(sockets))
        notes.sending(state, connections)
        _send_message(end, greeting, [state, *connections])
        notes.sent()
    except BaseException:
        notes.done()
        raise
    finally:
        os.close(state)


def owner(state: int, candidate: Owner) -> Owner:
    """The owner of the connections in the message with this `state`: the `candidate`, if nothing
    has asked before.

    A receiver asks before it serves the connections. What is left of a sender that was killed asks
    if it cannot tell whether the message was sent. Both get the same answer, whichever is killed
    next: the kernel adds a seal and rejects all others in one step, so that the first one to ask
    becomes the owner. Without a memfd, the owner cannot be recorded. The receiver then owns the
    message: connections that are lost are better than connections that two processes serve. It
    also owns the messages of earlier versions, whose memfd cannot be sealed.
    """
    with contextlib.suppress(OSError):
        fcntl.fcntl(state, fcntl.F_ADD_SEALS, candidate | fcntl.F_SEAL_SEAL)
    try:
        seals: int = fcntl.fcntl(state, fcntl.F_GET_SEALS)
    except OSError:  # it is not a memfd
        return Owner.RECEIVER
    return Owner.SENDER if seals & Owner.SENDER else Owner.RECEIVER


def _in_file(name: str, write: Callable[[BinaryIO], object]) -> int:
    """A memfd with what is written."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            write(file)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _in_socket(write: Callable[[BinaryIO], object], error: OSError) -> int:
    """A socket from which what is written can be received, as one message. If it is too long for
    that, raises the `error` because of which it is not in a file."""
    content = BytesIO()
    write(content)
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            ours.send(content.getbuffer(), socket.MSG_DONTWAIT)
            return theirs.detach()
    except OSError:
        raise error from None


def peek(end: socket.socket) -> int:
    """The number of connections that the next message claims to carry; 0 for an unknown format.

    Raises BlockingIOError if there is no message.
    """
    data = end.recv(GREETING.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if len(data) < GREETING.size:
        return 0
    _, _, count = GREETING.unpack(data)
    return min(int(count), BATCH)


def receive(
    end: socket.socket, form: Format, notes: Notes = NO_NOTES, *, copy: bool = False
) -> Message:
    """Take one message out of a channel, or a `copy`, which leaves it there. The notes are `done`
    once its connections are served.

    Raises BlockingIOError if there is no message, EOFError if none can ever arrive, HandoverError
    if it has another format, and Withdrawn if its sender owns it. A copy does not tell who owns
    it; if there is no room for its descriptors, raises OSError (EMFILE).
    """
    notes.receiving()
    try:
        data, files, flags = _receive_message(end, socket.MSG_PEEK if copy else 0)
        if copy and flags & socket.MSG_CTRUNC:
            for fd in files:
                os.close(fd)
            raise no_room()
        if not data and not files and _polled(end, select.POLLRDHUP):
            raise EOFError
        version = _check_greeting(data, len(files), flags, form)
    except (ValueError, struct.error) as error:
        notes.done()
        raise HandoverError(str(error), _as_sockets(files)) from None
    except (OSError, MemoryError, EOFError):
        notes.done()
        raise
    notes.received(files[0], files[1:])
    if not copy and owner(files[0], Owner.RECEIVER) is not Owner.RECEIVER:
        notes.withdrawn()  # once the state is closed, nobody could ask again
        for fd in files:
            os.close(fd)
        notes.done()
        raise Withdrawn
    return Message(version, files[0], files[1:], notes)


def no_room() -> OSError:
    """The error if there are no descriptors left for those in a message."""
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def discard(end: socket.socket) -> None:
    """Take a message out of a channel, and close its descriptors. Raises BlockingIOError if there
    is none."""
    end.recv(1, socket.MSG_DONTWAIT)  # without room for the descriptors, the kernel closes them


class Message:
    """A message taken out of a channel: call `read`, then `sockets` or `files`. Until both were
    called, nothing owns the descriptors. `version` is the version of its format."""

    def __init__(
        self, version: int, state: int, connections: list[int], notes: Notes = NO_NOTES
    ) -> None:
        self.version = version
        self._state = state
        self._connections = connections
        self._notes = notes

    def read(self, parse: Callable[[BinaryIO, int, int], T]) -> T:
        """The state, as parsed by `parse`, which receives the file, its size, and the number of
        connections.

        If `parse` raises ValueError, or the state cannot be read, HandoverError has the sockets.
        """
        try:
            with _content(self._state) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                result = parse(file, size, len(self._connections))
        except (ValueError, struct.error, OSError, MemoryError) as error:
            self._notes.done()
            sockets = _as_sockets([self._state, *self._connections])
            raise HandoverError(_reason(error), sockets) from None
        self._notes.close_state(self._state)
        return result

    def sockets(self, families: Iterable[int] = ()) -> list[socket.socket]:
        """The connections, in the order in which they were sent. Asking the kernel for each family
        takes longer than being told the `families`.

        If a descriptor is not a connection, it is closed, and HandoverError has the others; if a
        connection is of another family, HandoverError has all.
        """
        sockets = _as_sockets(self._connections, families)
        all_are = len(sockets) == len(self._connections)
        if not (all_are and all(_option(one, socket.SO_DOMAIN) == one.family for one in sockets)):
            self._notes.done()
            raise HandoverError("a descriptor is not the expected kind of socket", sockets)
        return sockets

    def files(self) -> list[int]:
        """The descriptors, whatever they are, in the order in which they were sent."""
        return self._connections


def _send_message(end: socket.socket, data: bytes, files: list[int]) -> None:
    """Send a message without waiting: all processes share O_NONBLOCK, and any may have cleared it.
    (`socket.send_fds` ignores flags.)"""
    packed = b"".join(map(_FD.pack, files))
    end.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)], socket.MSG_DONTWAIT)


def _receive_message(end: socket.socket, flags: int = 0) -> tuple[bytes, list[int], int]:
    """A message, its descriptors and flags. (`socket.recv_fds` does not set MSG_CMSG_CLOEXEC.)"""
    room = socket.CMSG_LEN((BATCH + 1) * _FD.size)
    wanted = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT | flags
    data, ancillary, flags, _ = end.recvmsg(GREETING.size + 1, room, wanted)
    rights = [packed for _, kind, packed in ancillary if kind == socket.SCM_RIGHTS]
    files = [fd for packed in rights for (fd,) in _FD.iter_unpack(packed)]
    return data, files, flags


def _check_greeting(data: bytes, files: int, flags: int, form: Format) -> int:
    """The version of a message's format. Raises ValueError if it cannot be read."""
    if not data:
        raise ValueError("the message is empty")
    name, version, count = GREETING.unpack(data)
    known = version in (form.version, *form.earlier)
    if name.rstrip(b"\0") != form.program or not known:
        raise ValueError(f"the format is {name!r} version {version}, not version {form.version}")
    if flags & socket.MSG_CTRUNC:
        raise ValueError(
            f"only {files} of {count + 1} descriptors could be received (raise RLIMIT_NOFILE:"
            " LimitNOFILE= in the unit)"
        )
    if files != count + 1:
        raise ValueError(f"{count} connections came with {files - 1} sockets")
    return int(version)


def _reason(error: Exception) -> str:
    return "out of memory" if isinstance(error, MemoryError) else str(error)


def _as_sockets(files: list[int], families: Iterable[int] = ()) -> list[socket.socket]:
    """The connections among the descriptors, with the given families, or else the families that
    the kernel reports. Other descriptors are closed: served as a client, an end of the channel
    would be shut down, and a listener would be handed over again and again."""
    found = []
    for fd, family in zip_longest(files, families, fillvalue=-1):
        kind = -1 if family == -1 else socket.SOCK_STREAM
        try:
            one = socket.socket(family, kind, min(kind, 0), fd)
        except OSError:
            os.close(fd)
            continue
        listens = _option(one, socket.SO_ACCEPTCONN)
        if _option(one, socket.SO_TYPE) == socket.SOCK_STREAM and not listens:
            found.append(one)
        else:
            one.close()
    return found


def _option(one: socket.socket, option: int) -> int:
    """The value of a socket option, from the kernel."""
    return one.getsockopt(socket.SOL_SOCKET, option)


def _content(state: int) -> BinaryIO:
    """The file with a state, or a copy of the message in a socket. Raises ValueError if it is
    neither, or contains less data than its size: a sparse file can have any size, and uses memory
    only once it is read."""
    found = os.fstat(state)
    if stat.S_ISSOCK(found.st_mode):
        return BytesIO(_received(state))
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("the state is not a file")
    if found.st_size and os.lseek(state, 0, os.SEEK_HOLE) < found.st_size:
        raise ValueError(f"the state has holes: {found.st_size} bytes, some of them missing")
    return open(state, "rb", closefd=False)


def _received(state: int) -> bytes:
    """The message in a socket, where it stays. The kernel doubles the size of a buffer."""
    one = socket.socket(fileno=state)
    try:
        return one.recv(2 * BUFFER, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    finally:
        one.detach()
