"""What one worker process runs: a server that obeys its supervisor and takes over connections."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import select
import signal
import socket
from collections.abc import Sequence
from io import FileIO
from typing import NamedTuple

from tcpupperd.config import Config
from tcpupperd.processes import handover
from tcpupperd.serving.counters import ACCEPTING, DAMAGED, GIVEN, HEARTBEAT, STATE, TAKEN
from tcpupperd.serving.handler import UpperHandler
from tcpupperd.serving.server import Call, UpperServer

log = logging.getLogger(__name__)

#: Orders of the supervisor. End of file, when it is gone, is an order too.
GIVE = b"g"  # your connections to the other workers
STORE = b"s"  # your connections to whoever comes next: all workers leave
DRAIN = b"d"  # answer what has come, and end your connections

#: Only one of the workers that wait is woken for what is to be taken.
EXCLUSIVELY = select.EPOLLIN | select.EPOLLEXCLUSIVE

#: Descriptors that a worker needs besides its connections.
RESERVE = 64


class Place(NamedTuple):
    """What a worker gets from its supervisor."""

    config: Config
    listeners: Sequence[socket.socket]
    listeners_outlive_us: bool  # somebody else holds them too, and will serve their queues
    channel: tuple[socket.socket, socket.socket]  # of hand-over: to give into, to take from
    channel_outlives_us: bool
    control: FileIO  # where orders come from
    numbers: memoryview  # the worker's slot of the scoreboard
    heartbeat: float  # seconds between signs of life, or 0


class Worker(UpperServer):
    """Serves until it is ordered to leave and its last connection has ended or gone elsewhere."""

    def __init__(self, place: Place) -> None:
        super().__init__(listeners=place.listeners, config=place.config, counters=place.numbers)
        self._place = place
        self._give_end, self._take_end = place.channel
        # For connections. No more of them are accepted than the next worker has room to take.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._batch = min(handover.BATCH, limit // 4)
        self._descriptors = limit - self._batch - min(RESERVE, limit // 4)
        self.capacity = min(self.capacity, self._descriptors)
        self._leaving = False
        self._taking = False
        self.add_entry(place.control, Call(self._obey))
        self._arrange_taking()

    def announce(self) -> None:
        """Tell the supervisor, who waits for signals only, that this worker accepts."""
        self._place.numbers[HEARTBEAT] = int(self.now * 1_000_000)
        self._place.numbers[STATE] = ACCEPTING
        with contextlib.suppress(PermissionError):  # it is gone, and our parent now process 1
            os.kill(os.getppid(), signal.SIGCHLD)

    def service_actions(self) -> None:
        """Once a turn: also a sign of life."""
        super().service_actions()
        self._arrange_taking()
        if self._place.heartbeat:
            self.counters[HEARTBEAT] = int(self.now * 1_000_000)

    def patience(self) -> float | None:
        """Seconds to wait at the most, so that the next sign of life comes in time."""
        patience = super().patience()
        if not self._place.heartbeat:
            return patience
        return min(self._place.heartbeat, math.inf if patience is None else patience)

    def _obey(self) -> None:
        order = self._place.control.read(1)
        self.remove_entry(self._place.control)
        if not order:
            order = STORE if self._place.channel_outlives_us else DRAIN
            log.warning("the supervisor is gone, leaving")
        self._leaving = True
        self._arrange_taking()
        # Whoever was woken for something and does not take it leaves it lying there until more
        # comes: EPOLLEXCLUSIVE woke nobody else. So the last thing is to take what is there. But
        # not if all leave: at the head of the channel it will be taken first, while with restarts
        # in quick succession it would else go to the end of it every time and never be served.
        if order != STORE:
            self._take_all()
        if order == DRAIN:
            self.drain(take_queues=not self._place.listeners_outlive_us)
        else:
            self.acceptor.take_queues()
            self.acceptor.stop()
            self._give(wait=order == GIVE)

    # Giving

    def _give(self, *, wait: bool) -> None:
        """Put all connections into the channel; with `wait`, as fast as others take them out."""
        connections = self.connections()
        for start in range(0, len(connections), self._batch):
            batch = connections[start : start + self._batch]
            try:
                handover.give(self._give_end, [pack(handler) for handler in batch])
            except OSError as error:
                self._cannot_give(error, wait=wait)
                return
            for handler in batch:
                self.remove_connection(handler)
                handler.finish()
            self.counters[GIVEN] += len(batch)

    def _cannot_give(self, error: OSError, *, wait: bool) -> None:
        if wait and isinstance(error, BlockingIOError):
            self.add_entry(self._give_end, Call(self._give_on), select.EPOLLOUT)
        else:
            log.warning("cannot hand over %d connections, ending them: %s", self.open, error)
            self.drain(take_queues=False)

    def _give_on(self) -> None:
        self.remove_entry(self._give_end)
        self._give(wait=True)

    # Taking

    def _has_room(self) -> bool:
        """Whether a whole message can be taken; of its descriptors the kernel would close those
        that are too many."""
        return self.open < self._descriptors

    def _arrange_taking(self) -> None:
        """Have the channel polled while there is room."""
        wanted = self._has_room() and not self._leaving
        if wanted != self._taking:
            self._taking = wanted
            if wanted:
                self.add_entry(self._take_end, Call(self._take), EXCLUSIVELY)
            else:
                self.remove_entry(self._take_end)

    def _take(self) -> None:
        """Take over one message's connections; BlockingIOError if there is none."""
        try:
            for connection in handover.take(self._take_end):
                self._take_over(connection)
        except handover.HandoverError as error:
            log.error("ending %d connections taken over: %s", len(error.sockets), error)
            self.counters[DAMAGED] += len(error.sockets)
            for request in error.sockets:
                self._take_over(handover.Connection(request, "", finished=True))

    def _take_all(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._has_room():
                self._take()

    def _take_over(self, connection: handover.Connection) -> None:
        self.counters[TAKEN] += 1
        handler = self.new_handler(connection.socket, connection.client_address)
        handler.unsent = unpack(handler, connection)
        self.add_connection(handler)
        self.schedule(handler)
        if handler.protocol.finished and not handler.lingers_until:
            self.attempt(UpperHandler.end, handler)


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


def run(place: Place) -> None:
    """Be a worker, until there is nothing left to do."""
    worker = Worker(place)
    worker.announce()
    worker.serve_forever()
