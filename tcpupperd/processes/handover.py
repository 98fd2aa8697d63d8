"""Handing over live connections to other processes, and taking over connections from them.

The workers share one handover channel and need not know about each other: an exiting worker hands
over, and the worker with the fewest connections takes over. The distribution stays even without
any coordination, because a worker with more connections than the others holds back briefly.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import select
import socket

from outlive.channel import NO_NOTES, HandoverError, Notes, peek
from outlive.remedies import remedy
from outlive.send_queue import send_queue
from tcpupperd.address import SERVICES
from tcpupperd.events import Event
from tcpupperd.host.messages import RateLimitedLog
from tcpupperd.processes import connection_format
from tcpupperd.processes.capacity import Capacity
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.processes.signals import wake_supervisor
from tcpupperd.serving.connection import Connection, State
from tcpupperd.serving.connections import NO_LINGER
from tcpupperd.serving.counters import (
    EXPECTED,
    HANDED_OVER_IN,
    HANDED_OVER_OUT,
    LONGEST_LINE,
    OPEN,
    STATE_UNREADABLE,
)
from tcpupperd.serving.server import UpperServer
from tcpupperd.words import counted

log = logging.getLogger(__name__)

#: The number of messages in one worker's share, if possible: with more messages, the distribution
#: is more even. Each message costs a memfd, so a busy worker sends larger ones.
PER_SHARE = 32

#: An upper bound on the bytes that a message occupies in the channel's buffer: 768 on kernels 6.1
#: to 6.18.
MESSAGE_SIZE = 1024

#: The errors if the channel is full, or if the user has too many descriptors in flight.
NO_ROOM = {errno.EAGAIN, errno.ETOOMANYREFS}

#: Seconds without taking over connections after an error for lack of memory or the like.
SHORTAGE_PAUSE = 0.1

#: Seconds before a worker that has held back, or could not hand over, tries again.
STEP_BACK = 0.001

#: If the worker with the fewest connections makes no progress for this many seconds, because it is
#: hung or cannot start, others take its share.
STALL_TIME = 2.0

#: Seconds without another message after which a worker logs how many connections it took over.
QUIET_TIME = 1.0


#: The state of a connection whose real state cannot be read; such a connection is only closed.
UNREADABLE = State(finished=True)


class Sender:
    """Puts the connections of a server into the channel."""

    def __init__(
        self,
        server: UpperServer,
        end: socket.socket,
        scoreboard: Scoreboard,
        capacity: Capacity,
        notes: Notes = NO_NOTES,
    ) -> None:
        self._server = server
        self._end = end
        self._scoreboard = scoreboard
        self._capacity = capacity
        self._notes = notes
        self._size = 0  # connections per message
        self._sent = 0
        self._wait = False
        self._failure: Exception | None = None  # why some connections could not be handed over

    def use(self, end: socket.socket) -> None:
        """Put the connections into another channel; to be called before `begin`."""
        self._end = end

    def begin(self, *, wait: bool) -> None:
        """Hand over all connections; with `wait`, wait until others take some if the channel is
        full."""
        self._wait = wait
        self._size = self._message_size()
        self._send()

    def _message_size(self) -> int:
        """The number of connections per message: small if there are few connections, so that every
        worker gets its share.

        Even if nothing is taken out before the next start, the messages of all workers must not
        fill more than half of the channel, or account for more than half of the descriptors that
        may be in flight.
        """
        workers = max(self._server.config.worker_count, len(self._scoreboard.loads()))
        size = self._scoreboard.open() // (workers * PER_SHARE)
        if not self._wait:
            fit = min(self._capacity.messages, room_for_messages(self._end) // 2)
            size = max(size, math.ceil(len(self._server.connections) * workers / max(1, fit)))
        return min(max(1, size), self._capacity.batch)

    def _send(self) -> None:
        connections = list(self._server.connections)
        try:
            for start in range(0, len(connections), self._size):
                self._send_batch(connections[start : start + self._size])
        except OSError as error:
            if self._wait and error.errno in NO_ROOM:
                self._await_room(error)
                return
            self._failure = error
        if self._sent:
            sent = counted(self._sent, "connection")
            log.info("handed over %s", sent, extra=Event.HANDED_OVER.fields())
        if self._failure:
            self._close_rest(self._failure)

    def _send_batch(self, batch: list[Connection]) -> None:
        """Put connections into the channel as one message; if that fails because of their state,
        as several, and leave out those for which even that fails. Raises OSError if the channel
        has no room at the moment."""
        try:
            connection_format.send(self._end, [self._packed(one) for one in batch], self._notes)
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in (*NO_ROOM, errno.EPIPE):
                raise
            if len(batch) == 1:
                self._failure = error
                return
            middle = len(batch) // 2
            self._send_batch(batch[:middle])
            self._send_batch(batch[middle:])
        else:
            self._close_sent(batch)

    def _packed(self, connection: Connection) -> connection_format.Connection:
        state = connection.state(self._server.poller.now)
        return connection_format.Connection(connection.socket, connection.client_address, state)

    def _close_sent(self, batch: list[Connection]) -> None:
        for connection in batch:
            self._server.connections.remove(connection)
            connection.socket.close()
            self._server.tally.ledger.forget(connection.fd)
            if self._server.tally.debug:
                lines = counted(connection.protocol.lines, "line")
                log.debug("%s: handed over after %s", connection, lines)
        self._notes.done()
        self._server.tally.numbers[OPEN] = len(self._server.connections)
        self._server.tally.add(HANDED_OVER_OUT, len(batch))
        self._sent += len(batch)

    def _await_room(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            self._server.poller.add(self._end, self._writable, select.EPOLLOUT)
        else:
            # No event signals that another worker has taken a message.
            self._server.poller.at(self._server.poller.now + STEP_BACK, self._send)

    def _close_rest(self, error: Exception) -> None:
        log.warning(
            "closing %s that cannot be handed over: %s%s",
            counted(len(self._server.connections), "connection"),
            error,
            _advice(error),
        )
        self._server.drain(take_queues=False)

    def _writable(self) -> None:
        self._server.poller.remove(self._end)
        self._send()


def _advice(error: Exception) -> str:
    if isinstance(error, BlockingIOError):
        return " (the channel is full)"
    if isinstance(error, BrokenPipeError):
        return " (a process shut the channel down)"
    return remedy(error)


class Receiver:
    """Takes connections out of the channel while the server has room and it is this worker's
    turn."""

    def __init__(
        self,
        server: UpperServer,
        channel: tuple[socket.socket, socket.socket],
        scoreboard: Scoreboard,
        capacity: Capacity,
        notes: Notes = NO_NOTES,
    ) -> None:
        self._server = server
        self._send_end, self._end = channel
        self._scoreboard = scoreboard
        self._notes = notes
        self._fairness = Fairness(scoreboard, server.config.worker_count)
        self._capacity = capacity
        self._polled = False
        self._stopped = False
        # A compromised worker may send anything.
        self._errors = RateLimitedLog(log, logging.ERROR)
        self._hung_up = False  # the channel, which the supervisor will replace
        self._warnings = RateLimitedLog(log)
        self._away = server.poller.at(math.inf)  # while pending, the channel is left to others
        self._received = 0  # connections, since this was last logged
        self._summary = server.poller.at(math.inf, self._log_summary)
        server.poller.each.append(self.update_interest)
        self.update_interest()

    def update_interest(self) -> None:
        """Start or stop polling the channel.

        A message wakes all workers. With EPOLLEXCLUSIVE, it would wake only one, and if that
        worker held back, no other would learn about the message.
        """
        wanted = not (self._stopped or self._hung_up or self._away.pending)
        if wanted != self._polled:
            self._polled = wanted
            if wanted:
                self._server.poller.add(self._end, self._readable)
            else:
                self._server.poller.remove(self._end)

    def use(self, channel: tuple[socket.socket, socket.socket]) -> None:
        """Take connections out of another channel."""
        if self._polled:
            self._server.poller.remove(self._end)
        self._send_end, self._end = channel
        self._polled = self._hung_up = False
        self.update_interest()

    def stop(self) -> None:
        """Leave the channel to others permanently."""
        self._log_summary()
        self._stopped = True
        self._away.cancel()
        self.update_interest()

    def _has_room(self, size: int) -> bool:
        """Whether a message with `size` connections can be taken: the kernel would discard excess
        descriptors. A worker without connections always tries: no other could have more room."""
        have = len(self._server.connections)
        return not have or have + size <= self._capacity.room

    def receive_all(self) -> None:
        """Take everything that is in the channel."""
        with contextlib.suppress(BlockingIOError):
            while not self._hung_up and self._has_room(peek(self._end)):
                self._receive()
        self._log_summary()

    def _readable(self) -> None:
        have, size, now = len(self._server.connections), peek(self._end), self._server.poller.now
        messages = send_queue(self._send_end) // MESSAGE_SIZE
        if not self._has_room(size):
            self._away.set(now + SHORTAGE_PAUSE)
        elif self._fairness.should_receive(have, size, messages, now):
            self._receive(size)
        else:
            self._away.set(now + STEP_BACK)

    def _receive(self, size: int = 0) -> None:
        """Take over the connections of one message, expected to be `size`. Raises BlockingIOError
        if there is no message."""
        # Count them before they leave the channel: they must not be missed in `excess`. They are
        # not OPEN yet, because another worker may be first: `loads` would show connections that
        # this worker does not have, and others would take messages that are its share.
        self._server.tally.numbers[EXPECTED] = size
        try:
            self._take_over(self._next_message())
        except EOFError:
            self._report_hang_up()
        finally:
            self._server.tally.numbers[EXPECTED] = 0

    def _next_message(self) -> list[connection_format.Connection]:
        """The connections of the next message; those whose state cannot be read are marked for
        closing. Raises BlockingIOError if there is none, EOFError if the channel was shut down."""
        try:
            return connection_format.receive(self._end, self._longest_line(), self._notes)
        except HandoverError as error:
            ended = counted(len(error.sockets), "connection")
            extra = Event.HANDOVER_DAMAGED.fields()
            text = "closing %s whose state cannot be restored: %s"
            self._errors.warn(text, ended, error, extra=extra)
            return [connection_format.Connection(one, "", UNREADABLE) for one in error.sockets]
        except BlockingIOError:
            raise
        except (OSError, MemoryError) as error:
            self._warnings.warn("not taking over connections: %s%s", error, remedy(error))
            self._away.set(self._server.poller.now + SHORTAGE_PAUSE)
            raise BlockingIOError from None  # the message is still there

    def _take_over(self, connections: list[connection_format.Connection]) -> None:
        # All of them, before anything of this message is served.
        added = [self._add(one) for one in self._without_strange(connections)]
        self._notes.done()
        for connection in filter(None, added):
            self._server.connections.attempt(Connection.resume, connection)
        self._server.tally.numbers[OPEN] = len(self._server.connections)
        self._server.tally.add(HANDED_OVER_IN, len(connections))
        self._received += len(connections)
        self._summary.set(self._server.poller.now + QUIET_TIME)

    def _report_hang_up(self) -> None:
        """Have the supervisor look at the channel, which a process has shut down: nothing else
        makes it hang up, because this process has both ends."""
        self._hung_up = True
        wake_supervisor()

    def _longest_line(self) -> int:
        """The largest max_line with which a connection may have been served. The supervisor knows
        it; this worker's configuration may have a smaller one."""
        return int(self._scoreboard.daemon[LONGEST_LINE])

    def _log_summary(self) -> None:
        if self._received:
            received = counted(self._received, "connection")
            log.info("took over %s", received, extra=Event.TAKEN_OVER.fields())
            self._warn_of_excess()
            self._server.tally.record_peaks()  # only now is no connection counted twice
            wake_supervisor()  # so that the status line shows how many connections there are
        self._received = 0
        self._summary.cancel()

    def _warn_of_excess(self) -> None:
        """Warn if the limit was lowered, and a restart could not hand over all connections."""
        found, limit = self._scoreboard.open(), self._capacity.limit
        if self._capacity.restart_keeps_connections and found > self._capacity.total_connections:
            self._warnings.warn(
                "%s are open, but with a limit of %d descriptors (RLIMIT_NOFILE; LimitNOFILE= in"
                " the unit), a restart can hand over only about %d; raise it before a restart",
                counted(found, "connection"),
                limit,
                self._capacity.total_connections,
            )

    def _without_strange(
        self, connections: list[connection_format.Connection]
    ) -> list[connection_format.Connection]:
        """The same connections, with those of services unknown to this version marked for
        closing."""
        names = [one.state.service for one in connections if one.state.service not in SERVICES]
        if not names:
            return connections
        ended = counted(len(names), "connection")
        self._errors.warn(
            "closing %s whose state cannot be restored: unknown service %s",
            ended,
            ascii(names[0]),
            extra=Event.HANDOVER_DAMAGED.fields(),
        )
        return [
            one._replace(state=UNREADABLE) if one.state.service in names else one
            for one in connections
        ]

    def _add(self, travelled: connection_format.Connection) -> Connection | None:
        """Add one connection to the server. An error affects only this connection."""
        server, (sock, client_address, state) = self._server, travelled
        connection = server.new_connection(sock, client_address, server.services[state.service])
        try:
            if state.owes:  # a keeper has it reset in case nothing takes it over
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            server.connections.add(connection)
        except OSError as error:
            connection.record_error(error)
            server.shutdown_request(sock)
            return None
        connection.restore(state, server.poller.now)
        if state is UNREADABLE:
            connection.set_end_reason(STATE_UNREADABLE)
        server.tally.ledger.take(connection)
        if server.tally.debug:
            log.debug("%s: taken over after %s", connection, counted(state.lines, "line"))
        return connection


class Fairness:
    """Decides whether a worker takes a message, or leaves it to those with fewer connections."""

    def __init__(self, scoreboard: Scoreboard, workers: int) -> None:
        self._scoreboard = scoreboard
        self._workers = workers
        self._lowest = -1
        self._since = 0.0  # when the lowest number last changed
        self._asked = 0.0

    def should_receive(self, have: int, size: int, messages: int, now: float) -> bool:
        """Whether a worker that has `have` connections takes the next message, which has `size`
        connections and is one of about `messages`.

        It takes messages until it has half of its share, which is an estimate, because messages
        may differ in size. After that, it may be ahead of the worker with the fewest connections
        by at most an eighth of a share, unless that worker makes no progress. Workers that have
        not been started yet also count; otherwise, the first one would take everything.
        """
        loads = self._scoreboard.loads()
        lowest = min(loads) if len(loads) >= self._workers else 0
        if lowest != self._lowest or now - self._asked > STALL_TIME / 2:
            self._lowest, self._since = lowest, now
        self._asked = now
        workers, total = max(self._workers, len(loads)), self._scoreboard.open()
        has_little = have + size <= (total + messages * size) // workers // 2
        is_not_ahead = have <= lowest + total // workers // 8
        return has_little or is_not_ahead or now - self._since > STALL_TIME


def room_for_messages(end: socket.socket) -> int:
    """The number of additional messages that are certain to fit in a channel's buffer."""
    room = end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return max(0, room - send_queue(end)) // MESSAGE_SIZE
