"""Giving live connections to other processes, and taking connections from them.

The workers share one channel and need not know each other: a worker that leaves gives, and the
worker with the fewest connections takes. This keeps their numbers even without any agreement: a
worker that has more connections than the others steps back from the channel for a moment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import select
import socket
import sys

from tcpupperd.events import Event
from tcpupperd.host.channel import HandoverError, peek
from tcpupperd.processes import handover
from tcpupperd.processes.capacity import Capacity
from tcpupperd.processes.scoreboard import LONGEST_LINE, Scoreboard
from tcpupperd.serving.connection import Connection, State
from tcpupperd.serving.counters import DAMAGED, GIVEN, OPEN, TAKEN
from tcpupperd.serving.server import UpperServer
from tcpupperd.serving.services import SERVICES, service_of
from tcpupperd.words import counted

log = logging.getLogger(__name__)

#: The number of messages that make up the share of one worker, if possible: more messages give a
#: more even result. Each message costs a memfd, so those of a busy worker are larger.
PER_SHARE = 32

#: An upper bound of the bytes that a message takes in the channel's buffer: 768 on kernels 6.1 to
#: 6.18.
MESSAGE_SIZE = 1024

#: Seconds until a worker that has left the channel to others, or cannot give, tries again.
STEP_BACK = 0.001

#: Seconds without progress of the worker with the fewest connections, after which others take its
#: share: it hangs, or cannot start.
STALL_TIME = 2.0

#: Seconds without another message after which a worker logs how many connections it took over.
QUIET_TIME = 1.0


#: Of a connection whose state cannot be read: it is only to be ended.
GONE = State(finished=True)


class Giver:
    """Puts the connections of a server into the channel."""

    def __init__(
        self, server: UpperServer, end: socket.socket, scoreboard: Scoreboard, capacity: Capacity
    ) -> None:
        self._server = server
        self._end = end
        self._scoreboard = scoreboard
        self._capacity = capacity
        self._size = 0  # connections per message
        self._given = 0
        self._wait = False
        self.look_at = math.inf  # when `go_on` must be called, even without an event

    def begin(self, *, wait: bool) -> None:
        """Give all connections; with `wait`, wait for takers if the channel is full."""
        self._wait = wait
        self._size = self._message_size()
        self._give()

    def go_on(self) -> None:
        """Call this in each loop iteration: tries again when it is time."""
        if self._server.poller.now >= self.look_at:
            self.look_at = math.inf
            self._give()

    def _message_size(self) -> int:
        """The number of connections per message: small if there are few connections, so that every
        worker gets its share.

        If no process takes until the next start, the messages of all workers must not fill more
        than half of the room in the channel and of the descriptors in flight.
        """
        workers = max(self._server.config.worker_count, len(self._scoreboard.loads()))
        size = self._scoreboard.open() // (workers * PER_SHARE)
        if not self._wait:
            fit = min(self._capacity.messages, room_for_messages(self._end) // 2)
            size = max(size, math.ceil(len(self._server.connections) * workers / max(1, fit)))
        return min(max(1, size), self._capacity.batch)

    def _give(self) -> None:
        connections = list(self._server.connections)
        for start in range(0, len(connections), self._size):
            batch = connections[start : start + self._size]
            try:
                handover.give(self._end, [self._packed(one) for one in batch])
            except OSError as error:
                self._cannot_give(error)
                return
            self._let_go(batch)
        if self._given:
            given = counted(self._given, "connection")
            log.info("handed over %s", given, extra=Event.HANDOVER_GIVEN.fields())

    def _packed(self, connection: Connection) -> handover.Connection:
        state = connection.state(self._server.poller.now)
        return handover.Connection(connection.socket, connection.client_address, state)

    def _let_go(self, batch: list[Connection]) -> None:
        for connection in batch:
            self._server.connections.remove(connection)
            connection.socket.close()
            if self._server.tally.debug:
                lines = counted(connection.protocol.lines, "line")
                log.debug("%s: handed over after %s", connection, lines)
        self._server.tally.numbers[OPEN] = len(self._server.connections)
        self._server.tally.add(GIVEN, len(batch))
        self._given += len(batch)

    def _cannot_give(self, error: OSError) -> None:
        full = isinstance(error, BlockingIOError)
        if self._wait and full:
            self._server.poller.add(self._end, self._writable, select.EPOLLOUT)
        elif self._wait and error.errno == errno.ETOOMANYREFS:
            # There is no event when others have taken.
            self.look_at = self._server.poller.now + STEP_BACK
        else:
            log.warning(
                "closing %s that cannot be handed over: %s (%s)",
                counted(len(self._server.connections), "connection"),
                error,
                "the channel is full" if full else "see LimitNOFILE=",
            )
            self._server.drain(take_queues=False)

    def _writable(self) -> None:
        self._server.poller.remove(self._end)
        self._give()


class Taker:
    """Takes connections out of the channel, while the server has room and it is its turn."""

    def __init__(
        self,
        server: UpperServer,
        channel: tuple[socket.socket, socket.socket],
        scoreboard: Scoreboard,
        capacity: Capacity,
    ) -> None:
        self._server = server
        self._give_end, self._end = channel
        self._scoreboard = scoreboard
        self._turn = Turn(scoreboard, server.config.worker_count)
        self._room = capacity.descriptors
        self._polled = False
        self._stopped = False
        self._away_until = 0.0  # until then, the channel is left to others
        self._taken = 0  # connections, since this was last logged
        self._tell_at = math.inf
        self.look_at = math.inf  # when `update_interest` must be called, even without an event

    def update_interest(self) -> None:
        """Call this in each loop iteration: starts or stops polling the channel, and logs what
        was taken over.

        A message wakes all workers. With EPOLLEXCLUSIVE it would wake one, and if that worker
        stepped back, no other would know of the message.
        """
        now = self._server.poller.now
        if now >= self._tell_at:
            self._tell()
        away = now < self._away_until
        self.look_at = min(self._away_until if away else math.inf, self._tell_at)
        wanted = self.has_room and not self._stopped and not away
        if wanted != self._polled:
            self._polled = wanted
            if wanted:
                self._server.poller.add(self._end, self._readable)
            else:
                self._server.poller.remove(self._end)

    def stop(self) -> None:
        """Leave the channel to others for good."""
        self._tell()
        self._stopped = True
        self._away_until = 0.0
        self.update_interest()

    @property
    def has_room(self) -> bool:
        """Whether a whole message can be taken: the kernel would discard descriptors in excess."""
        return len(self._server.connections) < self._room

    def take_all(self) -> None:
        """Take everything that is in the channel."""
        with contextlib.suppress(BlockingIOError):
            while self.has_room:
                self._take()
        self._tell()

    def _readable(self) -> None:
        server, size = self._server, peek(self._end)
        messages = filled(self._give_end) // MESSAGE_SIZE
        if self._turn.is_ours(len(server.connections), size, messages, server.poller.now):
            self._take(size)
        else:
            self._away_until = server.poller.now + STEP_BACK

    def _take(self, size: int = 0) -> None:
        """Take over the connections of one message, expected to be `size`. Raises BlockingIOError
        if there is no message."""
        # Count them before they leave the channel: otherwise another worker might accept new
        # connections in their place.
        self._server.tally.numbers[OPEN] = len(self._server.connections) + size
        try:
            connections = handover.take(self._end, self._longest_line())
        except HandoverError as error:
            ended = counted(len(error.sockets), "connection")
            extra = Event.HANDOVER_DAMAGED.fields()
            log.error("closing %s whose state cannot be restored: %s", ended, error, extra=extra)
            self._server.tally.add(DAMAGED, len(error.sockets))
            connections = [handover.Connection(one, "", GONE) for one in error.sockets]
        except EOFError:  # not the end, because this process has the giving end, too
            log.error("ignored an empty message in the handover channel")
            return
        for connection in self._without_strange(connections):
            self._take_over(connection)
        self._server.tally.numbers[OPEN] = len(self._server.connections)
        self._server.tally.add(TAKEN, len(connections))
        self._taken += len(connections)
        self._tell_at = self._server.poller.now + QUIET_TIME

    def _longest_line(self) -> int:
        """The largest max_line with which a connection may have been served: the supervisor knows,
        this worker's configuration may have another."""
        return int(self._scoreboard.daemon[LONGEST_LINE])

    def _tell(self) -> None:
        if self._taken:
            taken = counted(self._taken, "connection")
            log.info("took over %s", taken, extra=Event.HANDOVER_TAKEN.fields())
        self._taken, self._tell_at = 0, math.inf

    def _without_strange(
        self, connections: list[handover.Connection]
    ) -> list[handover.Connection]:
        """The same connections; those of a service that this version does not have are only to be
        ended."""
        names = [one.state.service for one in connections if one.state.service not in SERVICES]
        if not names:
            return connections
        ended = counted(len(names), "connection")
        log.error(
            "closing %s whose state cannot be restored: unknown service %s",
            ended,
            ascii(names[0]),
            extra=Event.HANDOVER_DAMAGED.fields(),
        )
        self._server.tally.add(DAMAGED, len(names))
        return [
            one._replace(state=GONE) if one.state.service in names else one for one in connections
        ]

    def _take_over(self, travelled: handover.Connection) -> None:
        """Serve one connection. An error ends only this connection."""
        server, (sock, client_address, state) = self._server, travelled
        connection = server.new_connection(sock, client_address, service_of(state.service))
        try:
            server.connections.add(connection)
        except OSError as error:
            connection.fail(error)
            server.shutdown_request(sock)
            return
        if server.tally.debug:
            log.debug("%s: taken over after %s", connection, counted(state.lines, "line"))
        if state is GONE:
            connection.reason = "damaged"  # which has been counted
        server.connections.attempt(lambda one, now: one.resume(state, now), connection)


class Turn:
    """Decides whether a worker takes, or leaves the channel to those with fewer connections."""

    def __init__(self, scoreboard: Scoreboard, workers: int) -> None:
        self._scoreboard = scoreboard
        self._workers = workers
        self._lowest = -1
        self._since = 0.0  # when the lowest number last changed
        self._asked = 0.0

    def is_ours(self, have: int, size: int, messages: int, now: float) -> bool:
        """Whether a worker that has `have` connections takes the next message, which has `size`
        connections and is one of about `messages`.

        It takes until it has half of its share, which is an estimate, because messages may differ
        in size. After that, it may be ahead of the worker with the fewest connections by at most
        an eighth of a share, unless that one makes no progress. Workers that are yet to be started
        count as well: otherwise the first one would take everything.
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
    """The number of further messages for which the buffer of a channel certainly has room."""
    room = end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return max(0, room - filled(end)) // MESSAGE_SIZE


def messages_in(end: socket.socket) -> int:
    """An upper bound of the number of messages in a channel."""
    return -(-filled(end) // (MESSAGE_SIZE // 2))


def filled(end: socket.socket) -> int:
    """The number of bytes in its buffer that were not received yet: SIOCOUTQ of unix(7), which is
    the same as TIOCOUTQ."""
    from termios import TIOCOUTQ  # seldom needed: at hand-over, or with few descriptors

    return int.from_bytes(fcntl.ioctl(end, TIOCOUTQ, bytes(4)), sys.byteorder)
