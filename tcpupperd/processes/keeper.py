"""The keeper of a worker: when the worker is killed, it hands over the worker's connections.

It is a process that shares the worker's table of descriptors, but not its memory, and sleeps. A
socket that the worker closes is closed for both; when the worker dies, the table lives on in its
keeper. What the dead memory knew is in the ledger, and in the notes about a message in flight.

Alternatives: descriptors sent to another process at each accept cost time for each connection, and
leak; a forked copy of the table goes stale; pidfd_getfd(2) finds no table in a dead process; and
with shared memory (CLONE_VM), the kernel kills both if it runs out of memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import monotonic
from typing import NamedTuple, NoReturn

from outlive.channel import BATCH, HandoverError, Owner, owner
from outlive.descriptors import Sharing
from tcpupperd.events import Event
from tcpupperd.host.in_flight import InFlight, Remainder
from tcpupperd.processes import connection_format
from tcpupperd.processes.connection_format import Connection
from tcpupperd.processes.orders import CHANNEL, Verdict
from tcpupperd.processes.process_name import shown_as
from tcpupperd.serving import fast_path
from tcpupperd.serving.audit import Audit, GoneError, UnknownError
from tcpupperd.serving.connections import NO_LINGER, RESET_AT_CLOSE
from tcpupperd.serving.counters import EXITING, HANDED_OVER_OUT, KEEPER, OPEN, RESET, STATE
from tcpupperd.serving.ledger import Ledger
from tcpupperd.serving.services import Service
from tcpupperd.words import counted

if fast_path.fast_path is fast_path.python_fast_path:
    import ctypes  # now, because of upgrades: see `library`

log = logging.getLogger(__name__)

#: Seconds until a keeper gives up handing over a connection for lack of room or memory.
GIVE_UP_TIME = 10.0

#: Flags of clone(2), from linux/sched.h, and the number of this system call, by machine.
CLONE_FILES, CLONE_PARENT = 0x400, 0x8000
SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "loongarch64": 220, "ppc64le": 120}

#: The name of a keeper.
NAME = "tcpupperd-keep"

#: The beginning of the name of a message's memfd in /proc.
STATE_NAME = f"/memfd:{connection_format.FORMAT.file_name}"


class Estate(NamedTuple):
    """What a worker leaves to its keeper."""

    numbers: memoryview  # its slot of the scoreboard
    control: socket.socket  # where the verdict comes from
    listeners: Mapping[int, str]  # the names of its listeners, by their numbers
    services: Mapping[str, Service]
    ledger: Ledger
    notes: InFlight
    longest_line: Callable[[], int]  # of any connection that may be in a message


class Keeper:
    """The keeper of this process, which is a worker. Its methods run in the worker, except those
    that begin with an underscore, which run in the keeper, once the worker is dead."""

    def __init__(self, estate: Estate) -> None:
        """Prepare a keeper; raises OSError if none is possible."""
        self._worker = os.getpid()
        self._pidfd = os.pidfd_open(self._worker)
        self._numbers = estate.numbers
        self._pid = 0  # of the keeper
        self._estate = estate
        self._ledger = estate.ledger
        self._inherited = {fd: _name(fd) for fd in _descriptors()}
        self._given = 0
        self._end = estate.control  # until the verdict: then, the sending end of the channel

    def start(self) -> None:
        """Start the keeper, or another one if it has died. Raises OSError."""
        sharing = Sharing.possible, Sharing.forks
        # If a keeper is killed immediately, the supervisor may have reaped it before it could know
        # whose it was.
        while not self._is_alive():
            pid = sibling(self._pidfd)
            if not pid:
                self._keep()
            self._pid = self._numbers[KEEPER] = pid
        # With a shared table, a descriptor that is closed is closed for both.
        Sharing.possible, Sharing.forks = sharing

    def _is_alive(self) -> bool:
        """Whether there is a keeper that has not been reaped."""
        if not self._pid:
            return False
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _keep(self) -> NoReturn:
        """The life of the keeper, from the death of the worker on."""
        try:
            self._settle()
        except BaseException:
            log.exception("bug: the keeper of worker %d cannot continue", self._worker)
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()  # os._exit does not call it
            os._exit(0)

    def _settle(self) -> None:
        """Hand over what can be handed over. The supervisor counts the rest as lost: OPEN."""
        left, rest = self._sorted()
        # Whatever becomes of this process, what it has not handed over is reset. Otherwise, an
        # incomplete answer would look like a complete one.
        ours = [*left.received, *map(socket.socket.fileno, rest)]
        _linger(ours, RESET_AT_CLOSE)
        self._end = socket.socket(fileno=self._ledger.channel)
        verdict = self._verdict()
        if verdict is Verdict.NOTHING:
            _linger(ours, NO_LINGER)
            return
        self._numbers[STATE] = EXITING
        self._numbers[OPEN] = 0  # those that are not handed over yet
        blame = verdict is Verdict.BLAME and not self._ledger.killed_from_outside
        received = self._connections(left) if left.received else []
        self._numbers[OPEN] += len(received)
        connections = [*self._audited(rest, verdict, blame=blame)]
        self._hand_over(connections, max(1, min(BATCH, len(connections) // 32)))
        # If reading a message is what killed the worker, the message is split. A connection that
        # does so alone is not handed over again.
        if blame and len(received) == 1:
            self._lose(received[0].socket, "it was being taken over")
        else:
            self._hand_over(received, 1 if blame else BATCH)
        if self._given:
            text, given = "handed over %s of worker %d", counted(self._given, "connection")
            extra = Event.HANDED_OVER.fields(TCPUPPERD_WORKER=self._worker)
            log.info(text, given, self._worker, extra=extra)

    def _verdict(self) -> Verdict:
        """What the supervisor says about the death of the worker. There may be messages that the
        worker has not read."""
        while True:
            message, files, *_ = socket.recv_fds(self._estate.control, 1, 2)
            if not message:
                # The supervisor has exited, or does not know this keeper, because the worker was
                # killed before it could say who its keeper is. The slot is another worker's then.
                self._numbers = memoryview(bytearray(self._numbers.nbytes)).cast("Q")
                return Verdict.HAND_OVER
            if message == CHANNEL:
                self._end = socket.socket(fileno=files[0])
            if message in {verdict.value for verdict in Verdict}:
                return Verdict(message)

    # What there is

    def _sorted(self) -> tuple[Remainder, list[socket.socket]]:
        """What is left of a handover, and the other connections of the worker."""
        left = self._estate.notes.remainder()
        connections = [fd for fd in _descriptors() if self._may_be_ours(fd) and _is_connection(fd)]
        if not left.is_complete:
            left = self._unnoted(connections)
        others = left.copies.union(left.received)
        return left, [socket.socket(fileno=fd) for fd in connections if fd not in others]

    def _may_be_ours(self, fd: int) -> bool:
        """Whether this is not what the worker had when the keeper was prepared: the number of a
        descriptor that was closed, such as that of a channel, is used again."""
        return self._inherited.get(fd) != _name(fd)

    def _unnoted(self, connections: Sequence[int]) -> Remainder:
        """What is left of a message that may have been received, but was not noted. The kernel
        installs the descriptors of a message in ascending order."""
        states = [fd for fd in _descriptors() if _name(fd).startswith(STATE_NAME)]
        strangers = tuple(fd for fd in connections if not self._ledger.knows(fd))
        if states and owner(states[0], Owner.RECEIVER) is Owner.RECEIVER:
            return Remainder(received=strangers, state=states[0])
        return Remainder(copies=frozenset(strangers))

    def _connections(self, left: Remainder) -> list[Connection]:
        longest = self._estate.longest_line()
        try:
            return connection_format.recover(left.state, left.received, longest)
        except HandoverError as error:
            self._numbers[OPEN] += len(error.sockets)
            for one in error.sockets:
                self._lose(one, str(error))
            return []

    def _audited(
        self, sockets: Sequence[socket.socket], verdict: Verdict, *, blame: bool
    ) -> Iterator[Connection]:
        services = self._estate.services
        audit = Audit(self._ledger, lambda name, client: services[name].protocol(client))
        self._numbers[OPEN] += len(sockets)
        for one in sockets:
            try:
                if verdict is Verdict.SPARE_MEMORY and self._ledger.owes(one.fileno()):
                    self._lose(one, "memory had run out")
                elif self._ledger.knows(one.fileno()):
                    yield Connection(*audit.served(one, blame=blame))
                elif found := self._newcomer(audit, one):
                    yield found
            except GoneError:
                self._numbers[RESET] += 1
                self._close(one)
            except (UnknownError, OSError, KeyError, MemoryError) as error:
                self._lose(one, str(error))

    def _newcomer(self, audit: Audit, one: socket.socket) -> Connection | None:
        name = self._estate.listeners[self._ledger.listener]
        found = Connection(*audit.newcomer(one, name))
        if self._estate.services[name].refusal(one, found.client_address) is None:
            return found
        _linger([one.fileno()], NO_LINGER)
        self._close(one)
        return None

    # What becomes of it

    def _hand_over(self, connections: Sequence[Connection], size: int) -> None:
        for start in range(0, len(connections), size):
            batch = connections[start : start + size]
            try:
                self._send(batch)
            except (OSError, MemoryError, struct.error) as error:  # the ledger may be damaged
                for connection in batch:
                    self._lose(connection.socket, str(error))
                continue
            for connection in batch:
                self._close(connection.socket)
            self._given += len(batch)
            self._numbers[HANDED_OVER_OUT] += len(batch)

    def _send(self, batch: Sequence[Connection]) -> None:
        """Put connections into the channel. Wait until it has room, and for memory, but not for
        ever. Those that are owed something are reset if nothing takes them out: see `Receiver`."""
        fds = [one.socket.fileno() for one in batch if not one.state.owes]
        until = monotonic() + GIVE_UP_TIME
        while True:
            _linger(fds, NO_LINGER)
            try:
                connection_format.send(self._end, batch)
            except BaseException as error:
                _linger(fds, RESET_AT_CLOSE)
                if not isinstance(error, (OSError, MemoryError)) or monotonic() > until:
                    raise
                select.select([], [], [], 0.01)
            else:
                return

    def _close(self, one: socket.socket) -> None:
        self._numbers[OPEN] -= 1
        one.close()

    def _lose(self, one: socket.socket, why: str) -> None:
        log.info("resetting connection %d of worker %d: %s", one.fileno(), self._worker, why)
        _linger([one.fileno()], RESET_AT_CLOSE)
        one.close()


def sibling(pidfd: int) -> int:
    """Fork a process that shares the descriptors of this one, but not its memory, and is a child
    of its parent; return the process ID here, and 0 there, once `pidfd` is ready. Raises
    OSError."""
    # Inherited, so that ps(1) never shows another name.
    with shown_as(NAME, f"tcpupperd: keeper of {os.getpid()}"):
        if fast_path.fast_path is not fast_path.python_fast_path:
            from tcpupperd.serving import _fast_path

            return int(_fast_path.sibling(pidfd))
        pid = _clone()
        if not pid:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
        return pid


def _clone() -> int:
    """The same without the C module, and without waiting."""
    python = ctypes.PyDLL(None, use_errno=True)
    number = SYS_CLONE.get(os.uname().machine, -1)  # -1: ENOSYS
    flags = ctypes.c_ulong(CLONE_FILES | CLONE_PARENT | signal.SIGCHLD)
    python.PyOS_BeforeFork()
    pid = int(python.syscall(ctypes.c_long(number), flags, *(ctypes.c_long(0) for _ in range(4))))
    if pid:
        python.PyOS_AfterFork_Parent()
    else:
        python.PyOS_AfterFork_Child()
    if pid < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return pid


def _descriptors() -> list[int]:
    """The descriptors of this process."""
    listed = sorted(map(int, os.listdir("/proc/self/fd")))
    return [fd for fd in listed if _name(fd)]  # without the one that has listed them


def _name(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _linger(fds: Iterable[int], how: bytes) -> None:
    """Set what closing these sockets, of whatever family, does."""
    for fd in fds:
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        with contextlib.suppress(OSError):  # the notes may name anything
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, how)
        one.detach()


def _is_connection(fd: int) -> bool:
    """Whether a descriptor is a stream socket that does not listen."""
    try:
        one = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return one.type == socket.SOCK_STREAM and not listens
    finally:
        one.detach()
