"""What one worker process runs: a server that obeys its supervisor and takes over connections."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Sequence
from io import FileIO
from typing import NamedTuple

from tcpupperd.config import Config
from tcpupperd.host import descriptors
from tcpupperd.host.sockets import Listener
from tcpupperd.processes.capacity import capacity
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.processes.transfer import Giver, Taker, messages_in
from tcpupperd.serving.counters import ACCEPTING, HEARTBEAT, LEAVING, STATE
from tcpupperd.serving.server import UpperServer

log = logging.getLogger(__name__)

#: Orders of the supervisor. End of file, when it is gone, is an order too.
GIVE = b"g"  # your connections to the other workers
GIVE_WITH_QUEUES = b"q"  # the same, and those in the queues, which nobody else will serve
STORE = b"s"  # your connections to whoever comes next: all workers leave
DRAIN = b"d"  # answer what has come, and end your connections

#: Descriptors that one wait finds ready at the most, by Python's epoll.
EVENTS = 1000


class WorkerContext(NamedTuple):
    """What a worker gets from its supervisor."""

    config: Config
    listeners: Sequence[Listener]
    listeners_outlive_us: bool  # somebody else holds them too, and will serve their queues
    channel: tuple[socket.socket, socket.socket]  # of hand-over: to give into, to take from
    channel_outlives_us: Callable[[], bool]  # there is somebody who keeps it
    control: FileIO  # where orders come from
    numbers: memoryview  # the worker's slot of the scoreboard
    scoreboard: Scoreboard  # of all workers
    heartbeat: float  # seconds between signs of life, or 0


class Worker(UpperServer):
    """Serves until it is ordered to leave and its last connection has ended or gone elsewhere."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(
            listeners=context.listeners, config=context.config, counters=context.numbers
        )
        self._context = context
        limit, kept = descriptors.limit(), context.channel_outlives_us()
        self._capacity = capacity(context.config, limit, kept=kept)
        self._giver = Giver(self, context.channel[0], context.scoreboard, self._capacity)
        self._taker = Taker(self, context.channel, context.scoreboard, self._capacity)
        self.acceptor.capacity = self._capacity.accepted
        if self._capacity.scarce:
            self.acceptor.allowance = self._room_together
        self.poller.add(context.control, self._obey)
        self._taker.arrange()

    def announce(self) -> None:
        """Tell the supervisor, who waits for signals only, that this worker accepts."""
        self._context.numbers[HEARTBEAT] = int(self.poller.now * 1_000_000)
        self._context.numbers[STATE] = ACCEPTING
        with contextlib.suppress(PermissionError):  # it is gone, and our parent now process 1
            os.kill(os.getppid(), signal.SIGCHLD)

    def service_actions(self) -> None:
        """Once a turn: also a sign of life."""
        self._giver.go_on()
        self._taker.arrange()
        super().service_actions()
        if self._context.heartbeat:
            self._context.numbers[HEARTBEAT] = int(self.poller.now * 1_000_000)

    def poll_timeout(self, until: float = math.inf) -> float | None:
        """Seconds until something is due, the next sign of life among it."""
        until = min(until, self._giver.look_at, self._taker.look_at)
        timeout = super().poll_timeout(until)
        if not self._context.heartbeat:
            return timeout
        return min(self._context.heartbeat, math.inf if timeout is None else timeout)

    def _room_together(self) -> float:
        """How many connections all workers may accept so that all could be handed over at a
        restart: while a reload or a start is under way, others hold some that will come to us."""
        waiting = messages_in(self._context.channel[0]) * self._capacity.batch
        return self._capacity.together - self._context.scoreboard.open() - waiting

    def _obey(self) -> None:
        order = self._context.control.read(1)
        self.poller.remove(self._context.control)
        if not order:
            order = STORE if self._context.channel_outlives_us() else DRAIN
            log.warning("the supervisor is gone, leaving")
        self._context.numbers[STATE] = LEAVING  # nobody leaves the channel to us any more
        self._taker.stop()
        if order == DRAIN:
            self._taker.take_all()
            self.drain(take_queues=not self._context.listeners_outlive_us)
        else:
            self._take_last(order)
            self.acceptor.stop()
            if order == STORE:
                self._answer()
            self._giver.begin(wait=order != STORE)

    def _answer(self) -> None:
        """Answer what has come by now. The next process would do it soon enough, but a stop may
        follow on the restart, and then there is none."""
        for _ in range(2 + len(self.connections) // EVENTS):
            ready = self.poller.wait(0)
            if len(self.connections.serve(ready)) == len(ready):
                return

    def _take_last(self, order: bytes) -> None:
        """Leave no connection in a queue that nobody else will take.

        Whoever was woken for one and does not take it leaves it lying there until more comes:
        EPOLLEXCLUSIVE woke nobody else. No more than there is room for, though: what waits in a
        queue is safe there, in the channel only if all of it fits. The next process looks into
        queues that somebody else holds, too.
        """
        if order == GIVE:
            self.acceptor.accept_from_each()
        elif order == GIVE_WITH_QUEUES or not self._context.listeners_outlive_us:
            self.acceptor.take_queues()


def run(context: WorkerContext) -> None:
    """Be a worker, until there is nothing left to do."""
    worker = Worker(context)
    worker.announce()
    worker.serve_forever()
