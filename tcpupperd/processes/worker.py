"""What one worker process runs: a server that obeys its supervisor and takes over connections."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import socket
from collections.abc import Sequence
from io import FileIO
from typing import NamedTuple

from tcpupperd.config import Config
from tcpupperd.host import descriptors
from tcpupperd.host.sockets import Listener
from tcpupperd.processes import handover
from tcpupperd.serving.connection import Connection, State
from tcpupperd.serving.counters import ACCEPTING, DAMAGED, GIVEN, HEARTBEAT, STATE, TAKEN
from tcpupperd.serving.server import UpperServer

log = logging.getLogger(__name__)

#: Orders of the supervisor. End of file, when it is gone, is an order too.
GIVE = b"g"  # your connections to the other workers
STORE = b"s"  # your connections to whoever comes next: all workers leave
DRAIN = b"d"  # answer what has come, and end your connections

#: Only one of the workers that wait is woken for what is to be taken.
EXCLUSIVELY = select.EPOLLIN | select.EPOLLEXCLUSIVE

#: Descriptors that a worker needs besides its connections.
RESERVE = 64


class WorkerContext(NamedTuple):
    """What a worker gets from its supervisor."""

    config: Config
    listeners: Sequence[Listener]
    listeners_outlive_us: bool  # somebody else holds them too, and will serve their queues
    channel: tuple[socket.socket, socket.socket]  # of hand-over: to give into, to take from
    channel_outlives_us: bool
    control: FileIO  # where orders come from
    numbers: memoryview  # the worker's slot of the scoreboard
    heartbeat: float  # seconds between signs of life, or 0


class Worker(UpperServer):
    """Serves until it is ordered to leave and its last connection has ended or gone elsewhere."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(
            listeners=context.listeners, config=context.config, counters=context.numbers
        )
        self._context = context
        self._give_end, self._take_end = context.channel
        # For connections. No more of them are accepted than the next worker has room to take.
        limit = descriptors.limit()
        self._batch = min(handover.BATCH, limit // 4)
        self._descriptors = limit - self._batch - min(RESERVE, limit // 4)
        self.capacity = min(self.capacity, self._descriptors)
        self._leaving = False
        self._taking = False
        self.poller.add(context.control, self._obey)
        self._update_interest()

    def announce(self) -> None:
        """Tell the supervisor, who waits for signals only, that this worker accepts."""
        self._context.numbers[HEARTBEAT] = int(self.poller.now * 1_000_000)
        self._context.numbers[STATE] = ACCEPTING
        with contextlib.suppress(PermissionError):  # it is gone, and our parent now process 1
            os.kill(os.getppid(), signal.SIGCHLD)

    def service_actions(self) -> None:
        """Once a turn: also a sign of life."""
        super().service_actions()
        self._update_interest()
        if self._context.heartbeat:
            self._context.numbers[HEARTBEAT] = int(self.poller.now * 1_000_000)

    def poll_timeout(self, until: float = math.inf) -> float | None:
        """Seconds to wait at the most, so that the next sign of life comes in time."""
        timeout = super().poll_timeout(until)
        if not self._context.heartbeat:
            return timeout
        return min(self._context.heartbeat, math.inf if timeout is None else timeout)

    def _obey(self) -> None:
        order = self._context.control.read(1)
        self.poller.remove(self._context.control)
        if not order:
            order = STORE if self._context.channel_outlives_us else DRAIN
            log.warning("the supervisor is gone, leaving")
        self._leaving = True
        self._update_interest()
        # Whoever was woken for something and does not take it leaves it lying there until more
        # comes: EPOLLEXCLUSIVE woke nobody else. So the last thing is to take what is there. But
        # not if all leave: at the head of the channel it will be taken first, while with restarts
        # in quick succession it would else go to the end of it every time and never be served.
        if order != STORE:
            self._take_all()
        if order == DRAIN:
            self.drain(take_queues=not self._context.listeners_outlive_us)
        else:
            self.acceptor.take_queues()
            self.acceptor.stop()
            self._give(wait=order == GIVE)

    # Giving

    def _give(self, *, wait: bool) -> None:
        """Put all connections into the channel; with `wait`, as fast as others take them out."""
        connections = list(self.connections)
        for start in range(0, len(connections), self._batch):
            batch = connections[start : start + self._batch]
            try:
                handover.give(self._give_end, [self._pack(one) for one in batch])
            except OSError as error:
                self._cannot_give(error, wait=wait)
                return
            for connection in batch:
                self.connections.remove(connection)
                connection.socket.close()
            self.tally.add(GIVEN, len(batch))

    def _pack(self, connection: Connection) -> handover.Connection:
        state = connection.state(self.poller.now)
        return handover.Connection(connection.socket, connection.client_address, **state._asdict())

    def _cannot_give(self, error: OSError, *, wait: bool) -> None:
        if wait and isinstance(error, BlockingIOError):
            self.poller.add(self._give_end, self._give_on, select.EPOLLOUT)
        else:
            count = len(self.connections)
            log.warning("cannot hand over %d connections, ending them: %s", count, error)
            self.drain(take_queues=False)

    def _give_on(self) -> None:
        self.poller.remove(self._give_end)
        self._give(wait=True)

    # Taking

    def _has_room(self) -> bool:
        """Whether a whole message can be taken; of its descriptors the kernel would close those
        that are too many."""
        return len(self.connections) < self._descriptors

    def _update_interest(self) -> None:
        """Have the channel polled while there is room."""
        wanted = self._has_room() and not self._leaving
        if wanted != self._taking:
            self._taking = wanted
            if wanted:
                self.poller.add(self._take_end, self._take, EXCLUSIVELY)
            else:
                self.poller.remove(self._take_end)

    def _take(self) -> None:
        """Take over one message's connections; BlockingIOError if there is none."""
        try:
            for connection in handover.take(self._take_end):
                self._take_over(connection)
        except handover.HandoverError as error:
            log.error("ending %d connections taken over: %s", len(error.sockets), error)
            self.tally.add(DAMAGED, len(error.sockets))
            for request in error.sockets:
                self._take_over(handover.Connection(request, "", finished=True))

    def _take_all(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._has_room():
                self._take()

    def _take_over(self, travelled: handover.Connection) -> None:
        """Serve one connection; if it cannot be, that is the end of it alone."""
        self.tally.add(TAKEN)
        sock, client_address = travelled.socket, travelled.client_address
        state = State(*travelled[2:])
        connection = self.new_connection(sock, client_address)
        try:
            self.connections.add(connection)
        except OSError as error:
            connection.fail(error)
            self.shutdown_request(sock)
            return
        self.connections.attempt(lambda one, now: one.resume(state, now), connection)


def run(context: WorkerContext) -> None:
    """Be a worker, until there is nothing left to do."""
    worker = Worker(context)
    worker.announce()
    worker.serve_forever()
