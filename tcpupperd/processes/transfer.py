"""Giving live connections to other processes, and taking theirs over.

The workers share one channel and need not know each other: who leaves gives, and whoever has the
fewest connections takes. That is all that keeps their numbers even, and it needs no agreement: a
worker that has more than the others steps back from the channel for a moment.
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

from tcpupperd.processes import handover
from tcpupperd.processes.capacity import Capacity
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.serving.counters import DAMAGED, GIVEN, OPEN, RESET, TAKEN
from tcpupperd.serving.handler import UpperHandler
from tcpupperd.serving.server import Call, UpperServer

log = logging.getLogger(__name__)

#: Messages that make up the share of one worker, if they may: the finer, the more even. Every
#: message costs a memfd, so the share of a busy worker has more in it.
PER_SHARE = 32

#: Bytes of the channel's buffer that a message takes: 768 on kernels from 6.1 to 6.18.
MESSAGE_SIZE = 1024

#: Seconds until a worker looks again that has left the channel to others, or cannot give on.
STEP_BACK = 0.001

#: Seconds without any progress of the worker with the fewest connections after which others take
#: in its place: it hangs, or cannot start.
PATIENCE = 2.0


class Giver:
    """Puts the connections of a server into the channel."""

    def __init__(
        self, server: UpperServer, end: socket.socket, scoreboard: Scoreboard, capacity: Capacity
    ) -> None:
        self._server = server
        self._end = end
        self._scoreboard = scoreboard
        self._capacity = capacity
        self._size = 0  # of a message
        self._wait = False
        self.look_at = math.inf  # when `go_on` is to be called, though nothing happens

    def begin(self, *, wait: bool) -> None:
        """Give all connections; with `wait`, as fast as others take them out."""
        self._wait = wait
        self._size = self._message_size()
        self._give()

    def go_on(self) -> None:
        """Once a turn: try again when it is time."""
        if self._server.now >= self.look_at:
            self.look_at = math.inf
            self._give()

    def _message_size(self) -> int:
        """Few connections go in small messages, so that every worker can have its share.

        If nobody takes until the next start, not so small that they fill more than half of the
        room that all workers have for messages, in the channel and in flight.
        """
        workers = max(self._server.config.worker_count, len(self._scoreboard.loads()))
        size = self._scoreboard.open() // (workers * PER_SHARE)
        if not self._wait:
            fit = min(self._capacity.messages, room_for_messages(self._end) // 2)
            size = max(size, math.ceil(self._server.open * workers / max(1, fit)))
        return min(max(1, size), self._capacity.batch)

    def _give(self) -> None:
        connections = self._server.connections()
        for start in range(0, len(connections), self._size):
            batch = connections[start : start + self._size]
            try:
                handover.give(self._end, [pack(handler) for handler in batch])
            except OSError as error:
                self._cannot_give(error)
                return
            self._let_go(batch)

    def _let_go(self, batch: list[UpperHandler]) -> None:
        for handler in batch:
            self._server.remove_connection(handler)
            handler.finish()
            if self._server.debug:
                log.debug("%s: given after %d lines", handler.name, handler.protocol.lines)
        self._server.counters[OPEN] = self._server.open
        self._server.counters[GIVEN] += len(batch)

    def _cannot_give(self, error: OSError) -> None:
        full = isinstance(error, BlockingIOError)
        if self._wait and full:
            self._server.add_entry(self._end, Call(self._writable), select.EPOLLOUT)
        elif self._wait and error.errno == errno.ETOOMANYREFS:
            self.look_at = self._server.now + STEP_BACK  # nothing tells when others have taken
        else:
            log.warning(
                "cannot hand over %d connections, ending them: %s (%s)",
                self._server.open,
                error,
                "the channel is full" if full else "see LimitNOFILE=",
            )
            self._server.drain(take_queues=False)

    def _writable(self) -> None:
        self._server.remove_entry(self._end)
        self._give()


class Taker:
    """Takes connections out of the channel, as long as a server has room and it is its turn."""

    def __init__(
        self,
        server: UpperServer,
        channel: tuple[socket.socket, socket.socket],
        scoreboard: Scoreboard,
        capacity: Capacity,
    ) -> None:
        self._server = server
        self._give_end, self._end = channel
        self._turn = Turn(scoreboard, server.config.worker_count)
        self._room = capacity.descriptors
        self._polled = False
        self._stopped = False
        self._away_until = 0.0  # left to others
        self.look_at = math.inf  # when `arrange` is to be called, though nothing happens

    def arrange(self) -> None:
        """Once a turn: have the channel polled or not.

        All workers are woken for a message, not one of them (EPOLLEXCLUSIVE): if that one stepped
        back, nobody else would know of the message.
        """
        away = self._server.now < self._away_until
        self.look_at = self._away_until if away else math.inf
        wanted = self.has_room and not self._stopped and not away
        if wanted != self._polled:
            self._polled = wanted
            if wanted:
                self._server.add_entry(self._end, Call(self._readable))
            else:
                self._server.remove_entry(self._end)

    def stop(self) -> None:
        """Leave the channel to others for good."""
        self._stopped = True
        self._away_until = 0.0
        self.arrange()

    @property
    def has_room(self) -> bool:
        """Whether a whole message can be taken; of its descriptors the kernel would close those
        that are too many."""
        return self._server.open < self._room

    def take_all(self) -> None:
        """Take whatever is there."""
        with contextlib.suppress(BlockingIOError):
            while self.has_room:
                self._take()

    def _readable(self) -> None:
        size, messages = handover.peek(self._end), filled(self._give_end) // MESSAGE_SIZE
        if self._turn.is_ours(self._server.open, size, messages, self._server.now):
            self._take(size)
        else:
            self._away_until = self._server.now + STEP_BACK

    def _take(self, size: int = 0) -> None:
        """Take over one message's connections, of which there seem to be so many; BlockingIOError
        if there is none."""
        # What is neither in the channel nor counted, another might accept in its place.
        self._server.counters[OPEN] = self._server.open + size
        try:
            connections = handover.take(self._end)
        except handover.HandoverError as error:
            log.error("ending %d connections taken over: %s", len(error.sockets), error)
            self._server.counters[DAMAGED] += len(error.sockets)
            connections = [handover.Connection(one, "", finished=True) for one in error.sockets]
        except EOFError:  # this process too could give: it was a message without anything
            log.error("an empty message was in the channel")
            return
        for connection in connections:
            self._take_over(connection)
        self._server.counters[OPEN] = self._server.open
        self._server.counters[TAKEN] += len(connections)

    def _take_over(self, connection: handover.Connection) -> None:
        server = self._server
        try:
            handler = server.new_handler(connection.socket, connection.client_address)
            handler.unsent = unpack(handler, connection)
            server.add_connection(handler)
        except (OSError, MemoryError) as error:
            server.counters[RESET] += 1
            log.debug("a connection cannot be taken over: %s", error)
            connection.socket.close()
            return
        server.schedule(handler)
        if server.debug:
            log.debug("%s: taken over after %d lines", handler.name, connection.lines)
        if handler.protocol.finished and not handler.lingers_until:
            server.attempt(UpperHandler.end, handler)


class Turn:
    """Whether a worker takes, or leaves the channel to those that have fewer connections."""

    def __init__(self, scoreboard: Scoreboard, workers: int) -> None:
        self._scoreboard = scoreboard
        self._workers = workers
        self._lowest = -1
        self._since = 0.0  # when the lowest number was first the one it is
        self._asked = 0.0

    def is_ours(self, have: int, size: int, messages: int, now: float) -> bool:
        """Whether a worker with so many connections takes the next message, of that size, of
        about so many.

        It does until it has half of its share, which is an estimate: messages need not be of one
        size. Then it runs ahead of the worker with the fewest by no more than an eighth, unless
        that one makes no progress. Workers that have yet to be started count: the first one would
        take all.
        """
        loads = self._scoreboard.loads()
        lowest = min(loads) if len(loads) >= self._workers else 0
        if lowest != self._lowest or now - self._asked > PATIENCE / 2:
            self._lowest, self._since = lowest, now
        self._asked = now
        workers, counted = max(self._workers, len(loads)), self._scoreboard.open()
        has_little = have + size <= (counted + messages * size) // workers // 2
        is_not_ahead = have <= lowest + counted // workers // 8
        return has_little or is_not_ahead or now - self._since > PATIENCE


def room_for_messages(end: socket.socket) -> int:
    """How many more messages the buffer of a channel takes for sure."""
    room = end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return max(0, room - filled(end)) // MESSAGE_SIZE


def messages_in(end: socket.socket) -> int:
    """How many messages there are in a channel at the most."""
    return -(-filled(end) // (MESSAGE_SIZE // 2))


def filled(end: socket.socket) -> int:
    """Bytes of its buffer that wait for others to receive them: SIOCOUTQ of unix(7), which is
    the same as TIOCOUTQ."""
    from termios import TIOCOUTQ  # seldom needed: at hand-over, or with few descriptors

    return int.from_bytes(fcntl.ioctl(end, TIOCOUTQ, bytes(4)), sys.byteorder)


def pack(handler: UpperHandler) -> handover.Connection:
    """A connection as it travels to another process."""
    now, protocol = handler.server.now, handler.protocol
    return handover.Connection(
        handler.request,
        handler.client_address,
        lines=protocol.lines,
        held=protocol.held,
        unsent=bytes(handler.unsent),
        mid_line=protocol.mid_line,
        finished=protocol.finished,
        eof=handler.eof,
        idle_for=now - handler.active,
        line_open_for=now - handler.line_began if protocol.mid_line else 0.0,
        lingers_for=handler.lingers_until - now if handler.lingers_until else None,
    )


def unpack(handler: UpperHandler, connection: handover.Connection) -> bytes:
    """Give a new handler the state of one that has travelled; returns what is unsent."""
    now, protocol = handler.server.now, handler.protocol
    answer = protocol.resume(connection.lines, connection.mid_line, connection.held)
    if connection.finished:
        protocol.finish()
    handler.eof = connection.eof
    handler.active = now - connection.idle_for
    handler.line_began = now - connection.line_open_for if protocol.mid_line else 0.0
    if connection.lingers_for is not None:
        handler.lingers_until = now + connection.lingers_for
    return connection.unsent + answer
