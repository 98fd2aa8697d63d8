"""A worker process: a server that takes orders from the supervisor and takes over connections."""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

from outlive import descriptors
from outlive.remedies import remedy
from outlive.send_queue import send_queue
from tcpupperd.config import Config
from tcpupperd.host.in_flight import InFlight
from tcpupperd.host.sockets import Listener
from tcpupperd.processes.capacity import capacity
from tcpupperd.processes.daemon_report import collect_report
from tcpupperd.processes.handover import Receiver, Sender
from tcpupperd.processes.keeper import Estate, Keeper
from tcpupperd.processes.orders import CHANNEL, NEW_KEEPER, Order
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.processes.signals import fetch_abort, wake_supervisor
from tcpupperd.serving import fast_path
from tcpupperd.serving.counters import (
    ACCEPTING,
    EXITING,
    GENERATION,
    HEARTBEAT,
    LONGEST_LINE,
    STARTING,
    STATE,
    STOPPING_SOON,
    WORKERS_STARTED,
)
from tcpupperd.serving.ledger import Ledger
from tcpupperd.serving.report import Report
from tcpupperd.serving.server import UpperServer

log = logging.getLogger(__name__)

#: Seconds after which a worker that accepts fewer connections than its share checks whether it may
#: accept more.
SETTLE_INTERVAL = 0.02

#: Seconds after which a worker reports that it is accepting although the channel is not empty yet:
#: another worker may be hung, and there may be no room.
ANNOUNCE_TIME = 5.0

#: Errors that may not last.
SHORTAGE = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}

#: The maximum number of descriptors that Python's epoll returns from one wait.
EVENTS = 1000


class WorkerContext(NamedTuple):
    """What a worker receives from the supervisor."""

    config: Config
    instance: str  # the name of the configuration
    listeners: Sequence[Listener]
    listeners_outlive_us: bool  # another process also holds them and will serve their queues
    channel: tuple[socket.socket, socket.socket]  # for the handover: sending and receiving end
    channel_outlives_us: Callable[[], bool]  # whether the service manager keeps it
    control: socket.socket  # where orders come from
    numbers: memoryview  # the worker's slot of the scoreboard
    is_first: bool  # whether this is the first slot
    scoreboard: Scoreboard  # of all workers
    heartbeat: float  # seconds between heartbeats, or 0
    manager: int  # the process that started the daemon: the service manager
    path: str | None  # of the configuration file


class Worker(UpperServer):
    """Serves until it is told to exit and its last connection has been closed or handed over."""

    def __init__(self, context: WorkerContext) -> None:
        self.instance = context.instance
        super().__init__(
            listeners=context.listeners,
            config=context.config,
            counters=context.numbers,
        )
        self._context = context
        # Exiting workers are left out: what they hand over would be counted twice.
        self.tally.open_together = lambda: sum(context.scoreboard.loads())
        self._channel = context.channel
        limit, kept = descriptors.limit(), context.channel_outlives_us()
        self._capacity = capacity(context.config, limit, kept=kept)
        self._notes = notes = InFlight()
        self._keeper: Keeper | None = None
        board = context.scoreboard
        self._sender = Sender(self, context.channel[0], board, self._capacity, notes)
        self._receiver = Receiver(self, context.channel, board, self._capacity, notes)
        waits = self._capacity.one_generation_accepts
        self.acceptor.capacity = -math.inf if waits else self._capacity.accepted
        self._announce_by = self.poller.now + ANNOUNCE_TIME
        self.poller.add(context.control, self._handle_order)

    def start_keeper(self) -> None:
        """Start a keeper, and record what it needs; the daemon also works without one."""
        context = self._context
        try:
            ledger = Ledger(descriptors.limit())
            ledger.use_channel(context.channel[0].fileno())
            keeper = Keeper(
                Estate(
                    numbers=context.numbers,
                    control=context.control,
                    listeners={one.number: one.name for one in context.listeners},
                    services=self.services,
                    ledger=ledger,
                    notes=self._notes,
                    longest_line=lambda: int(context.scoreboard.daemon[LONGEST_LINE]),
                )
            )
            keeper.start()
        except OSError as error:
            started = context.scoreboard.daemon[WORKERS_STARTED]
            is_first = context.is_first and started <= context.config.worker_count
            level = logging.WARNING if is_first or error.errno in SHORTAGE else logging.DEBUG
            text = "the connections of a worker that is killed will be lost: %s%s"
            log.log(level, text, error, remedy(error))
        else:
            self._keeper = keeper
            self.tally.ledger = ledger
            fast_path.share(ledger)

    def _replace_keeper(self) -> None:
        """Start another keeper, because this one has died."""
        if self._keeper:
            try:
                self._keeper.start()
            except OSError as error:
                text = "the connections of worker %d will be lost if it is killed: %s%s"
                log.warning(text, os.getpid(), error, remedy(error))

    def prepare(self, listeners: Sequence[Listener]) -> None:
        """Do nothing: the supervisor has numbered the listeners, and set the options of their
        sockets, which all workers share. A worker of a failed reload that is slow to start could
        set them again after the supervisor has returned to the previous generation."""

    def begin(self) -> None:
        """Start accepting."""
        self._beat()
        self._settle()
        self.acceptor.update_interest()

    def _announce(self) -> None:
        """Accept a few connections, then tell the supervisor, which waits only for signals, that
        this worker is accepting. Without the former, new clients would wait in vain if a restart
        followed immediately."""
        self.acceptor.accept_from_each()
        self._context.numbers[STATE] = ACCEPTING
        wake_supervisor()

    def _beat(self) -> None:
        """Record a heartbeat, and again after each interval."""
        self._context.numbers[HEARTBEAT] = int(self.poller.now * 1_000_000)
        if self._context.heartbeat:
            fetch_abort(self._context.manager)
            self.poller.at(self.poller.now + self._context.heartbeat, self._beat)

    def more_can_come(self) -> bool:
        """Whether there is a listener or a connection left, or the channel may bring more."""
        return self._context.numbers[STATE] != EXITING or super().more_can_come()

    def is_stopping_soon(self) -> bool:
        """Whether new clients should go to another server, because the daemon is about to stop."""
        return bool(self._context.scoreboard.daemon[STOPPING_SOON]) or super().is_stopping_soon()

    def report(self) -> Report:
        """The state of the daemon."""
        limit = self._capacity.accepted * self.config.worker_count
        listeners, path = self.acceptor.listeners, self._context.path
        return collect_report(
            self._context.scoreboard,
            listeners,
            limit=limit,
            path=path,
            leaving=self.is_stopping_soon(),
        )

    def _settle(self) -> None:
        """Accept up to this worker's share of the connections that a restart can hand over.

        Because shares are fixed, no worker has to know how many connections the others are
        accepting at the moment. A new worker begins once the earlier ones have exited and what
        they handed over has been taken over. If others then have more than their share, it accepts
        fewer by that number.
        """
        share, numbers = self._capacity.accepted, self._context.numbers
        channel_is_empty = not send_queue(self._channel[0])
        if channel_is_empty:  # read first: what has left the channel is counted in `excess`
            allowed = share - self._context.scoreboard.excess(numbers[GENERATION], share)
            self.acceptor.capacity = max(self.acceptor.capacity, allowed)
        is_settled = self.acceptor.capacity == share
        if numbers[STATE] == STARTING and (
            is_settled or channel_is_empty or self.poller.now >= self._announce_by
        ):
            self._announce()
        if not is_settled:
            self.poller.at(self.poller.now + SETTLE_INTERVAL, self._settle)

    def _handle_order(self) -> None:
        message, files, *_ = socket.recv_fds(self._context.control, 1, 2)
        if message == NEW_KEEPER:
            self._replace_keeper()
            return
        if message == CHANNEL:
            self._use_channel([socket.socket(fileno=fd) for fd in files])
            return
        order = self._order(message)
        self.poller.remove(self._context.control)
        self._context.numbers[STATE] = EXITING  # so that no other worker waits for this one
        self._receiver.stop()
        if order is Order.DRAIN:
            self._receiver.receive_all()
            self.drain(take_queues=not self._context.listeners_outlive_us)
            return
        self._accept_last(order)
        self.acceptor.stop()
        if order is Order.LEAVE_IN_STORE:
            self._answer()
        self._sender.begin(wait=order is not Order.LEAVE_IN_STORE)

    def _use_channel(self, ends: list[socket.socket]) -> None:
        """Use another channel: a process has shut down the previous one."""
        before, self._channel = self._channel, (ends[0], ends[1])
        self.tally.ledger.use_channel(ends[0].fileno())
        self._sender.use(ends[0])
        self._receiver.use(self._channel)
        for end in before:
            end.close()

    def _order(self, message: bytes) -> Order:
        if message:
            return Order(message)
        log.warning("the supervisor has exited; exiting")
        return Order.LEAVE_IN_STORE if self._context.channel_outlives_us() else Order.DRAIN

    def _answer(self) -> None:
        """Answer what has arrived. The next process would soon do this, but if the restart is
        followed by a stop, there will be none."""
        for _ in range(2 + len(self.connections) // EVENTS):
            ready = self.poller.wait(0)
            if len(self.connections.serve(ready)) == len(ready):
                return

    def _accept_last(self, order: Order) -> None:
        """Do not leave a connection in a queue that no other process will serve.

        With EPOLLEXCLUSIVE, a new connection wakes only one worker. If that worker does not accept
        the connection, it stays in the queue until another one arrives. However, accept no more
        than there is room for: connections are always safe in a queue, but in the channel only if
        they all fit. If another process also holds the listeners, the next process will serve
        their queues.
        """
        if order is Order.HAND_OVER:
            self.acceptor.accept_from_each()
        elif order is Order.HAND_OVER_WITH_QUEUES or not self._context.listeners_outlive_us:
            self.acceptor.take_queues()


def run(context: WorkerContext) -> None:
    """Run a worker until there is nothing left to do."""
    worker = Worker(context)
    worker.start_keeper()
    worker.begin()
    worker.serve_forever()
