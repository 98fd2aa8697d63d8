"""The audit of a dead worker's connections: what is each of them owed?

The answer is that of the kernel's counts and the ledger together. If they do not agree, nobody
knows, and the connection has to be reset: a missing answer is better than a false one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from tcpupperd.address import LAB
from tcpupperd.host.tcp_info import CLOSE, CLOSE_WAIT, ESTABLISHED, Counts, counts
from tcpupperd.serving.connection import LINGER_TIME, State
from tcpupperd.serving.ledger import EOF, FINISHED, LINGERS, MID_LINE, RAW, Entry, Ledger
from tcpupperd.serving.protocol import Protocol
from tcpupperd.settings import INTRODUCED


class UnknownError(Exception):
    """Nobody can say what a connection is owed."""


class GoneError(Exception):
    """The connection has failed, or the client has reset it."""


class Audited(NamedTuple):
    """A connection, ready to be served by another worker."""

    socket: socket.socket
    client_address: object
    state: State


class Audit:
    """Audits the connections in a ledger. `protocol` creates the protocol for a service and the
    address of a client, as for a new connection."""

    def __init__(self, ledger: Ledger, protocol: Callable[[str, object], Protocol]) -> None:
        self._ledger = ledger
        self._protocol = protocol
        self._now = monotonic()

    def newcomer(self, one: socket.socket, listener: str) -> Audited:
        """A connection that was accepted, but not served yet, from the listener with this name,
        which need not be that of its service. Raises UnknownError and OSError."""
        found = _counts(one)
        if found and (found.consumed or found.written):
            raise UnknownError("it is not in the ledger")
        address = one.getpeername() if found else ""
        protocol = self._protocol(listener, address)
        service, opening = protocol.service, protocol.opening
        state = State(unsent=opening, finished=protocol.finished, service=service)
        return Audited(one, address, state)

    def served(self, one: socket.socket, *, blame: bool) -> Audited:
        """A connection in the ledger. With `blame`, the one that was being served when the worker
        died is not to be served again, because it may be the cause. Raises UnknownError, GoneError
        and OSError."""
        fd, found = one.fileno(), _counts(one)
        if found and found.state == CLOSE:
            raise GoneError
        try:
            entry = self._ledger.entry(fd)
            if blame and self._is_suspect(fd, entry, found):
                raise UnknownError("it was being served when its worker crashed or hung")
            noted, address = self._noted(fd, entry)
            if found:
                noted = noted._replace(idle_for=found.idle)
                address = address if entry.description else one.getpeername()
            return Audited(one, address, self._state(one, entry, noted, address, found))
        except ValueError as error:
            raise UnknownError(str(error)) from None

    def _is_suspect(self, fd: int, entry: Entry, found: Counts | None) -> bool:
        """Whether a pass was in progress, and had not answered what it had received. This must
        not do what the worker did."""
        if not self._ledger.in_progress(fd):
            return False
        owed = _owed(found, entry)
        return owed != 0 or self._ledger.has_received_nothing

    def _noted(self, fd: int, entry: Entry) -> tuple[State, object]:
        """The state and the client's address as of the last note."""
        now, line = self._now, entry.line_began
        service, reason, address, introduction = _described(entry.description)
        state = State(
            lines=entry.lines,
            held=entry.held,
            unsent=entry.unsent,
            mid_line=bool(entry.flags & MID_LINE),
            finished=bool(entry.flags & FINISHED),
            eof=bool(entry.flags & EOF),
            idle_for=now - entry.last_activity if entry.last_activity else 0.0,
            line_open_for=now - line if line else 0.0,
            lingers_for=entry.lingers_until - now if entry.flags & LINGERS else None,
            service=service,
            open_for=now - self._ledger.began(fd),
            reason=reason,
            introduction=introduction,
        )
        return state, address

    def _state(
        self,
        one: socket.socket,
        entry: Entry,
        noted: State,
        address: object,
        found: Counts | None,
    ) -> State:
        """The state as of the worker's death. Raises UnknownError and ValueError."""
        if found and found.state not in (ESTABLISHED, CLOSE_WAIT) and noted.lingers_for is None:
            noted = noted._replace(lingers_for=LINGER_TIME)
        if noted.lingers_for is not None:  # the server has closed its side, after all answers
            return noted._replace(held=b"", unsent=b"", mid_line=False, finished=True)
        owed = _owed(found, entry)
        if noted.finished:
            return noted._replace(unsent=_rest(noted.unsent, b"", owed))
        data = self._received(one, noted, owed)
        if noted.service != "upper":
            held = noted.held + (data or b"")
            unsent = _rest(noted.unsent, held, owed)
            return noted._replace(held=held, mid_line=bool(held), unsent=unsent)
        if entry.flags & RAW:
            noted, data = noted._replace(held=b""), noted.held + (data or b"")
        return _replayed(noted, data, self._protocol(noted.service, address), owed)

    def _received(self, one: socket.socket, noted: State, owed: int | None) -> bytes | None:
        """What the pass in progress, if any, has received; None for the end of file. Raises
        UnknownError and ValueError."""
        if not self._ledger.in_progress(one.fileno()):
            return b""
        if owed is None:
            raise UnknownError("a Unix socket does not say what was sent")
        if noted.service == LAB:
            raise UnknownError("an order was being carried out")
        left: int | None = owed - len(noted.unsent) - len(noted.held)
        if left and not one.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE):
            left = None  # urgent data is counted, too, but not received
        return self._ledger.received(left)


def _counts(one: socket.socket) -> Counts | None:
    """What the kernel has counted; None for a Unix socket. Raises OSError."""
    return None if one.family == socket.AF_UNIX else counts(one)


def _owed(found: Counts | None, entry: Entry) -> int | None:
    """The number of bytes that a connection is owed; None if nobody knows."""
    return found.consumed - found.written - entry.offset if found else None


def _replayed(noted: State, data: bytes | None, protocol: Protocol, owed: int | None) -> State:
    """The state after a pass that has received `data`, or with None the end of file."""
    due = protocol.resume(noted.lines, noted.mid_line, noted.held)
    due += protocol.receive(data) if data else b"" if data is not None else protocol.receive_eof()
    unsent, held = noted.unsent + due, bytes(protocol.held)
    if owed is not None:
        total = len(noted.unsent) + len(noted.held) + len(data or b"")
        owed -= total - len(unsent) - len(held)  # what the protocol has ignored
    same_line = protocol.mid_line and protocol.lines == noted.lines
    return noted._replace(
        lines=protocol.lines,
        held=held,
        unsent=_rest(unsent, held, owed),
        mid_line=protocol.mid_line,
        finished=protocol.finished,
        eof=noted.eof or data is None,
        line_open_for=noted.line_open_for if same_line else 0.0,
    )


def _rest(unsent: bytes, held: bytes, owed: int | None) -> bytes:
    """The part of an unsent answer that the kernel does not have yet, if so many bytes are owed
    together with what is held. Nothing of that has been sent."""
    if owed is None:
        if unsent:
            raise UnknownError("a Unix socket does not say what was sent")
        return unsent
    sent = len(unsent) + len(held) - owed
    if not 0 <= sent <= len(unsent):
        raise UnknownError(f"{len(unsent)} and {len(held)} bytes are noted, but {owed} are owed")
    return unsent[sent:]


def _described(words: bytes) -> tuple[str, str, object, dict[str, str]]:
    """The service, the reason why it ends, the address and the introduction of a client."""
    if not words:
        return "upper", "", "", {}
    service, reason, host, port, *pairs = words.decode().split("\n")
    known = dict(pair.split(" ", 1) for pair in pairs)
    introduction = {name: text for name, text in known.items() if name in INTRODUCED}
    return service, reason, (host, int(port)) if host else "", introduction
