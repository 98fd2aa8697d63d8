"""One connection: its socket and its protocol, driven by epoll events instead of a thread."""

from __future__ import annotations

import logging
import math
import os
import select
import socket
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from outlive.send_queue import send_queue
from tcpupperd.config import Config
from tcpupperd.serving.counters import (
    CLIENT_CLOSED,
    COMPLETE,
    DRAIN_TIMEOUT,
    IDLE_TIMEOUT,
    LINE_TIMEOUT,
    PROBE,
    RESET,
    SERVICE_STOPPED,
    WRITE_TIMEOUT,
    Tally,
    reason,
)
from tcpupperd.serving.fast_path import ANSWERED, RECEIVE_SIZE, fast_path, receive
from tcpupperd.serving.introduction import NOBODY, Introduction
from tcpupperd.serving.protocol import Ending, Protocol
from tcpupperd.words import written

if TYPE_CHECKING:
    from tcpupperd.serving.fast_path import Outcome

log = logging.getLogger(__name__)

#: No unsent answer. An unsent answer is always a view, never bytes: each send shortens it, and
#: shortening bytes copies what remains.
NOTHING = memoryview(b"")

#: Seconds that a client has to close its side after the server has closed its own.
LINGER_TIME = 2.0

#: The same, if closing its own side is what the client has asked the server to do.
HALF_CLOSED_TIME = 3600.0

#: Seconds that a new client has to send something when the service stops. Other clients must
#: expect their connection to end, but a new client would regard a connection that ends without any
#: answer as a failure.
NEW_CLIENT_TIME = 1.0


class Next(Enum):
    """What to do with a connection next."""

    WATCH = "wait for its `interest` and its `deadline`, one of which has changed"
    SCHEDULE = "wait for its `deadline`, which has changed"
    CLOSE = "close it"
    RESET = "reset it"


class Timeout(Enum):
    """What a deadline is for, with the counter of connections that it ends."""

    IDLE = IDLE_TIMEOUT
    LINE = LINE_TIMEOUT
    WRITE = WRITE_TIMEOUT
    LINGER = None
    PROCEED = ()


class Limits(NamedTuple):
    """Limits for clients, in seconds and connections per source. Infinity means no limit."""

    idle_timeout: float
    line_timeout: float
    write_timeout: float
    shortest: float  # of these timeouts
    per_source: float

    @classmethod
    def of(cls, config: Config) -> Limits:
        """The limits of a configuration, in which 0 means no limit."""
        timeouts = (config.idle_timeout, config.line_timeout, config.write_timeout)
        idle, line, write = (timeout or math.inf for timeout in timeouts)
        per_source = config.max_connections_per_source or math.inf
        return cls(idle, line, write, min(idle, line, write), per_source)


class State(NamedTuple):
    """The state that another process needs, besides the socket, to continue a connection.

    Times are relative, in seconds, because the clocks of two processes may differ (a time
    namespace, a restored container).
    """

    lines: int = 0
    held: bytes = b""  # of an incomplete line
    unsent: bytes = b""
    mid_line: bool = False
    finished: bool = False
    eof: bool = False
    idle_for: float = 0.0
    line_open_for: float = 0.0
    lingers_for: float | None = None
    service: str = "upper"
    open_for: float = 0.0
    reason: str = ""  # why it ends, if it lingers
    introduction: Introduction = NOBODY

    @property
    def owes(self) -> bool:
        """Whether the client does not have the whole answer to what was received."""
        return bool(self.unsent or self.held)


class Connection:
    """Answers one client.

    Its methods take the time (CLOCK_MONOTONIC) and return what the caller must do next; None means
    nothing. They raise BlockingIOError if it turns out that the socket was not ready, and any
    other OSError if the connection has failed.

    What it waits for follows from its state: to send while anything is `unsent`, otherwise to
    receive. The server therefore does not read from a client that does not read its answers.
    """

    # No __dict__ per connection: ten thousand idle connections should be cheap.
    __slots__ = (
        "began",
        "bucket",
        "client_address",
        "eof",
        "fd",
        "introduction",
        "last_activity",
        "limits",
        "line_began",
        "lingers_until",
        "protocol",
        "reason",
        "socket",
        "tally",
        "unsent",
    )

    def __init__(
        self,
        sock: socket.socket,
        client_address: object,
        protocol: Protocol,
        limits: Limits,
        tally: Tally,
    ) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.fd = sock.fileno()
        self.client_address = client_address
        self.protocol = protocol
        self.introduction = NOBODY  # what a load balancer says about the client
        self.limits = limits
        self.tally = tally
        self.unsent = NOTHING
        self.eof = False  # the client has closed its side
        self.last_activity = 0.0  # when data was last received or sent; at first, when added
        self.line_began = 0.0  # when the first byte of an incomplete line arrived, or 0
        self.lingers_until = 0.0  # set while the server's side is closed, but not the client's
        self.bucket: set[int] | None = None  # the bucket that holds its deadline
        self.began = 0.0  # when the client connected; set when added
        self.reason = ""  # why it ends; counted when it is set

    def handle(self, now: float) -> Next | None:
        """Send what is left, or receive once and answer immediately."""
        if self.unsent:
            return self._noted(self._flush(now))
        protocol, tally = self.protocol, self.tally
        if tally.debug or not protocol.whole_lines or type(held := protocol.held) is not bytes:
            return self._noted(self._receive(now))
        counts = tally.counts
        before = counts[ANSWERED]
        outcome = fast_path(self.fd, counts, held)
        answered = counts[ANSWERED] - before
        self.last_activity = now
        if outcome is None and not self.line_began:
            protocol.lines += answered
            return None
        return self._noted(self._after_fast_path(outcome, answered, now))

    def _noted(self, following: Next | None) -> Next | None:
        """Note in the ledger what is still owed, unless the connection is to be closed."""
        if following is not Next.CLOSE and following is not Next.RESET:
            self.tally.ledger.note(self)
        return following

    def _after_fast_path(self, outcome: Outcome, answered: int, now: float) -> Next | None:
        """Deal with what `fast_path` has left."""
        protocol = self.protocol
        if outcome == b"":
            return self._answer(b"", now)
        if isinstance(outcome, int):  # the connection failed; received lines count as answered
            protocol.lines += answered
            self.record_error(OSError(outcome, os.strerror(outcome)))
            return Next.CLOSE
        unsent, rest = outcome if isinstance(outcome, tuple) else (b"", outcome or b"")
        # What `fast_path` has sent counts as received, but includes what was held earlier.
        self.tally.received += len(unsent) + len(rest) - len(protocol.held)
        due = protocol.resume(protocol.lines + answered, bool(rest), rest)
        self._time_line(answered)
        if unsent:
            self.unsent = memoryview(unsent + due)
            return Next.WATCH
        return Next.WATCH if due and not self._send(due) else None

    def _receive(self, now: float) -> Next | None:
        """Receive once and answer, or continue an answer that the kernel can now accept. While a
        protocol waits for its time to proceed, only a failure of the connection ends the wait."""
        protocol = self.protocol
        if protocol.proceeds_at is None:
            return self._answer(receive(self.fd, protocol.receive_size or RECEIVE_SIZE), now)
        self.socket.send(b"")  # sends nothing, but fails if the connection has failed
        if protocol.proceeds_at > now:
            raise BlockingIOError
        return self._proceed(now)

    def _proceed(self, now: float) -> Next | None:
        """Send the next part of an answer that is not sent all at the same time."""
        protocol = self.protocol
        before = protocol.lines
        answer = protocol.proceed(self, now)
        self.last_activity = now
        self.tally.counts[ANSWERED] += protocol.lines - before
        self._time_line(protocol.lines - before)
        if answer and not self._send(answer):
            return Next.WATCH
        ending = self._half_close(now) if protocol.finished else None
        return ending or Next.WATCH

    def _answer(self, data: bytes, now: float, opening: bytes = b"") -> Next | None:
        """Answer received data according to the protocol, after an opening."""
        protocol, tally = self.protocol, self.tally
        before = protocol.lines
        if data:
            answer = protocol.receive(data)
        else:
            self.eof = True
            if not before and self._is_silent:
                self.set_end_reason(PROBE)
            answer = protocol.receive_eof()
        self.last_activity = now
        tally.received += len(data)
        tally.counts[ANSWERED] += protocol.lines - before
        if protocol.mid_line or self.line_began:
            self._time_line(protocol.lines - before)
        if tally.debug:
            log.debug("%s: received %d bytes, answering %d", self, len(data), len(answer))
        if opening:
            answer = opening + answer
        if answer and not self._send(answer):
            return Next.WATCH
        if protocol.proceeds_at is not None:
            return self._proceed(now)
        return self._half_close(now) if protocol.finished else None

    def open(self, now: float) -> Next | None:
        """Send what the protocol sends first to a client that has just connected."""
        opening = self.protocol.opening
        if opening and not self._send(opening):
            return self._noted(Next.WATCH)
        return self._noted(self._half_close(now) if self.protocol.finished else None)

    def close_gracefully(self, now: float) -> Next | None:
        """Stop answering: flush, close the server's side and wait briefly for the client to close
        its side."""
        self.protocol.finish()
        return self._noted(None if self.unsent else self._half_close(now))

    def drain_step(self, now: float, *, new_client_time: float) -> Next | None:
        """Handle a connection while the server stops: answer what has arrived; if nothing has,
        close the server's side. A client that has not sent anything yet has `new_client_time`
        seconds to do so."""
        if self.unsent or self.protocol.finished:
            return None
        try:
            return self.handle(now)
        except BlockingIOError:
            return None if self._is_new(now, new_client_time) else self.close_for_stop(now)

    def close_for_stop(self, now: float) -> Next | None:
        """Close it gracefully because the server is stopping."""
        self.set_end_reason(SERVICE_STOPPED)
        return self.close_gracefully(now)

    def linger_briefly(self, now: float) -> Next | None:
        """Wait no longer than usual for the client to close its side."""
        if self.lingers_until <= now + LINGER_TIME:
            return None
        self.lingers_until = now + LINGER_TIME
        return Next.SCHEDULE

    def abort(self, now: float) -> Next:
        """Close it immediately. If unsent answers are lost, reset it so that the client knows."""
        if not self.unsent:
            self.set_end_reason(SERVICE_STOPPED)
            return Next.CLOSE
        self.set_end_reason(DRAIN_TIMEOUT)
        return Next.RESET

    def expire(self, now: float) -> Next | None:
        """Act on the deadline, if it has passed."""
        when, timeout = self.deadline()
        if when > now:
            return Next.SCHEDULE
        if timeout is Timeout.LINGER:
            return self._linger(now)
        if timeout is Timeout.PROCEED:
            return self._noted(self._proceed(now))
        # If a header is incomplete, its protocol has a reason of its own.
        if timeout is not Timeout.LINE or not self.protocol.identifies_client:
            self.set_end_reason(timeout.value)
            log.debug("%s: %s", self, self.reason)
        return Next.RESET if timeout is Timeout.WRITE else self.close_gracefully(now)

    def set_end_reason(self, counter: int, words: str = "") -> None:
        """Record and count why the connection ends; only the first reason counts."""
        if not self.reason:
            self.reason = words or reason(counter)
            self.tally.add(counter)

    def record_error(self, error: OSError) -> None:
        """Count and log that the connection to the client has failed."""
        if self._is_silent and isinstance(error, ConnectionError):
            self.set_end_reason(PROBE)
        else:
            self.set_end_reason(RESET, str(error.strerror).lower())
        if self.tally.debug:
            log.debug("%s: %s", self, error)

    def deadline(self) -> tuple[float, Timeout]:
        """When to close this connection, and why."""
        limits = self.limits
        if self.lingers_until:
            return self.lingers_until, Timeout.LINGER
        if self._waits_to_send:
            return self.last_activity + limits.write_timeout, Timeout.WRITE
        if self.protocol.proceeds_at is not None:
            return self.protocol.proceeds_at, Timeout.PROCEED
        idle = self.last_activity + limits.idle_timeout
        # A request is expected immediately: it may have one of the few places in a full worker.
        began = self.began if self.protocol.is_privileged else self.line_began
        line = began + limits.line_timeout if began else math.inf
        return (line, Timeout.LINE) if line < idle else (idle, Timeout.IDLE)

    @property
    def interest(self) -> int:
        """The epoll events to wait for."""
        if self._waits_to_send:
            return select.EPOLLOUT
        return select.EPOLLIN if self.protocol.proceeds_at is None else 0

    @property
    def _waits_to_send(self) -> bool:
        return bool(self.unsent) or self.protocol.proceeds_at == 0

    def __str__(self) -> str:
        return written(self.client_address)

    def state(self, now: float) -> State:
        """The state that another process needs to continue."""
        protocol = self.protocol
        return State(
            lines=protocol.lines,
            held=protocol.left(now),
            unsent=bytes(self.unsent),
            mid_line=protocol.mid_line,
            finished=protocol.finished,
            eof=self.eof,
            idle_for=now - self.last_activity,
            line_open_for=now - self.line_began if protocol.mid_line else 0.0,
            lingers_for=self.lingers_until - now if self.lingers_until else None,
            service=protocol.service,
            open_for=now - self.began,
            reason=self.reason,
            introduction=self.introduction,
        )

    def restore(self, state: State, now: float) -> None:
        """Take over the state of another process, instead of starting from the beginning."""
        protocol = self.protocol
        answer = protocol.resume(state.lines, state.mid_line, state.held)
        if state.finished:
            protocol.finish()
        self.introduction = state.introduction
        self.unsent = memoryview(state.unsent + answer)
        self.eof = state.eof
        self.began = now - state.open_for
        self.last_activity = now - state.idle_for
        self.line_began = now - state.line_open_for if protocol.mid_line else 0.0
        if state.lingers_for is not None:
            self.lingers_until = now + state.lingers_for
            # It was counted when the lingering began. 0.1.0 does not hand it over.
            self.reason = state.reason or reason(COMPLETE)

    def resume(self, now: float) -> Next | None:
        """Continue where another process stopped."""
        self.tally.ledger.begin(self.fd)
        ends = self.protocol.finished and not self.lingers_until
        return self._noted((self.close_gracefully(now) if ends else None) or Next.WATCH)

    def _is_new(self, now: float, new_client_time: float) -> bool:
        """Whether the client has just connected and may be about to send its first line."""
        return self._is_silent and now - self.last_activity < new_client_time

    @property
    def _is_silent(self) -> bool:
        """Whether the client has sent nothing and is still expected to send something."""
        protocol = self.protocol
        proceeds = protocol.proceeds_at is not None
        return not (protocol.lines or protocol.mid_line or protocol.finished or proceeds)

    def _time_line(self, answered: int) -> None:
        """Record when the incomplete line began."""
        if not self.protocol.mid_line:
            self.line_began = 0.0
        elif answered or not self.line_began:
            self.line_began = self.last_activity

    def _send(self, answer: bytes) -> bool:
        """Send immediately and keep what the kernel does not accept; return whether it accepted
        everything."""
        try:
            sent = self.socket.send(answer)
        except BlockingIOError:
            sent = 0
        self.tally.sent += sent
        if sent == len(answer):
            return True
        # Copy the rest: a view would keep the whole answer in memory until the client reads.
        self.unsent = memoryview(answer[sent:])
        return False

    def _flush(self, now: float) -> Next | None:
        """Send more of what is left; start receiving again once nothing is."""
        sent = self.socket.send(self.unsent)
        self.last_activity = now
        self.tally.sent += sent
        self.unsent = self.unsent[sent:]
        if self.unsent:
            return None
        self.unsent = NOTHING  # frees the answer
        if self.line_began:
            self.line_began = now  # the rest of the line could not be received in the meantime
        ending = self._half_close(now) if self.protocol.finished else None
        return ending or Next.WATCH

    def _half_close(self, now: float) -> Next | None:
        """Call this when all answers have been sent: closes the connection if the client's side is
        closed, too. A client that has been identified is served by another protocol instead.

        Otherwise, closes the server's side and lets the client read everything up to the end of
        file. Closing the socket with unread input would make the kernel reset the connection and
        discard answers in flight.
        """
        if self.protocol.identifies_client:
            return self._serve_identified(now)
        if self.protocol.ending is Ending.RESET:
            self.set_end_reason(COMPLETE)
            return Next.RESET
        if self.eof:
            self.set_end_reason(CLIENT_CLOSED)
            return Next.CLOSE
        if self.lingers_until:
            return None
        self.set_end_reason(COMPLETE)
        self.socket.shutdown(socket.SHUT_WR)
        waits = self.protocol.ending is Ending.HALF_CLOSE
        self.lingers_until = now + (HALF_CLOSED_TIME if waits else LINGER_TIME)
        return Next.WATCH

    def _serve_identified(self, now: float) -> Next | None:
        """Continue with the protocol for the client that this one has identified, or refuse the
        client. Data from it may already have been received."""
        found = self.protocol.successor(self)
        if not found:
            self.socket.shutdown(socket.SHUT_WR)
            return Next.CLOSE
        self.protocol, received = found
        ledger = self.tally.ledger
        ledger.describe(self, self.protocol.opening, received, raw=True)
        ledger.begin(self.fd)
        if not received:
            return self.open(now)
        self.tally.received -= len(received)  # counted with the header, and again below
        return self._answer(received, now, self.protocol.opening)

    def _linger(self, now: float) -> Next:
        """Continue lingering if the client has not acknowledged all answers yet.

        After a close, the kernel would still send what it has, but any input from the client would
        make it reset the connection and discard the answers. After `write_timeout` without
        progress, the kernel stops the lingering with an error.
        """
        if self.socket.family == socket.AF_UNIX or not send_queue(self.socket):
            return Next.CLOSE
        timeout = self.limits.write_timeout
        milliseconds = 0 if timeout == math.inf else int(timeout * 1000)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self.lingers_until = now + LINGER_TIME
        return Next.SCHEDULE
