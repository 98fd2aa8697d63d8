"""The fleet: all worker processes. It starts, watches, retires and kills them, and makes no
decision about the service."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import NamedTuple, NoReturn

from outlive.channel import Channel
from outlive.remedies import remedy
from tcpupperd.events import Event, Extra, fields
from tcpupperd.processes import signals
from tcpupperd.processes.backoff import Backoff
from tcpupperd.processes.generation import Generation
from tcpupperd.processes.keepers import Keepers
from tcpupperd.processes.orders import Order
from tcpupperd.processes.scoreboard import Scoreboard, Slot
from tcpupperd.processes.watchdog import Watchdog
from tcpupperd.processes.worker_process import WorkerProcess
from tcpupperd.serving.counters import (
    KEEPER,
    LONGEST_LINE,
    OPEN,
    WORKERS_DIED_EXIT,
    WORKERS_DIED_HUNG,
    WORKERS_DIED_KILL_TIMEOUT,
    WORKERS_DIED_SIGNAL,
)
from tcpupperd.words import counted

log = logging.getLogger(__name__)

#: Exit status of a worker that hit a bug: EX_SOFTWARE of sysexits.h.
EX_SOFTWARE = 70


class Failure(NamedTuple):
    """Why a worker could not be started."""

    message: str
    extra: Extra


class Fleet:
    """Keeps the workers of one generation running. Workers of others may be exiting."""

    def __init__(
        self,
        scoreboard: Scoreboard,
        work: Callable[[Generation, Slot, int], object],
        watchdog_interval: float,
    ) -> None:
        """`work` is what a worker does, in its own process: it is called with the generation, the
        slot and the descriptor from which orders are read."""
        self._scoreboard = scoreboard
        self._work = work
        self._workers: dict[int, WorkerProcess] = {}
        self._keepers = Keepers(scoreboard)  # of workers that have died
        self._generation: Generation | None = None
        self._watchdog = Watchdog(watchdog_interval)
        self.backoff = Backoff()

    def __len__(self) -> int:
        return len(self._workers)

    def __bool__(self) -> bool:
        """Whether there is a worker, or a keeper of one."""
        return bool(self._workers or self._keepers)

    def serve(self, generation: Generation | None, *, after_failure: bool = False) -> None:
        """From now on, keep the workers of this generation running; None to start no more. With
        `after_failure`, a failure of the previous generation still delays the next attempt."""
        self._generation = generation
        if generation:
            self._scoreboard.raise_to(LONGEST_LINE, generation.config.max_line)
        if not after_failure:
            self.backoff.reset()

    @property
    def missing(self) -> int:
        """The number of workers to start."""
        wanted = self._generation.config.worker_count if self._generation else 0
        return max(0, wanted - len(self._current()))

    @property
    def is_complete(self) -> bool:
        """Whether all workers of the generation accept connections."""
        if not self._generation or self.missing:
            return False
        return all(worker.is_accepting for worker in self._current())

    @property
    def retired_have_stopped(self) -> bool:
        """Whether no worker that was told to exit still accepts connections."""
        return not any(worker.order and worker.is_accepting for worker in self._workers.values())

    @property
    def next_wake(self) -> float:
        """The time at which something is due."""
        retry = self.backoff.retry_at if self.missing else math.inf
        deadlines = (worker.kill_at for worker in self._workers.values())
        return min(retry, self._watchdog.check_at, self._keepers.next_wake, *deadlines)

    def _current(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers.values() if self._is_current(worker)]

    def _is_current(self, worker: WorkerProcess) -> bool:
        return worker.generation is self._generation and not worker.order

    # Start

    def fill(self) -> Failure | None:
        """Start the missing workers, unless it is too early after a failure."""
        while self._generation and self.missing and monotonic() >= self.backoff.retry_at:
            if failure := self.start(self._generation):
                return failure
        return None

    def start(self, generation: Generation) -> Failure | None:
        """Start one worker."""
        try:
            slot = self._scoreboard.claim(id(generation))
            try:
                pid, control = self._fork(generation, slot)
            except OSError:
                self._scoreboard.release(slot)
                raise
        except OSError as error:
            extra = Event.WORKER_DIED.fields(ERRNO=error.errno)
            why = f"{error.strerror}{remedy(error)}"
            return self._failed(f"cannot start a worker: {why}", extra)
        self._workers[pid] = WorkerProcess(pid, slot, control, generation)
        return None

    def _fork(self, generation: Generation, slot: Slot) -> tuple[int, int]:
        """Fork a worker; return its process ID and the supervisor's end of its control socket."""
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        orders, control = (end.detach() for end in pair)
        try:
            pid = os.fork()
        except OSError:
            os.close(orders)
            os.close(control)
            raise
        if not pid:
            self._run_worker(generation, slot, orders, control)
        os.close(orders)
        return pid, control

    def _run_worker(
        self, generation: Generation, slot: Slot, orders: int, control: int
    ) -> NoReturn:
        """The whole life of a worker. Everything is in one `try`: if an exception escaped from
        it, this process would go back to being a supervisor, a second one."""
        status = EX_SOFTWARE
        try:
            os.close(control)
            self.close()
            self._work(generation, slot, orders)
            status = 0
        except BaseException as error:
            if how_to := remedy(error):
                log.error("worker %d cannot continue: %s%s", os.getpid(), error, how_to)
            else:
                log.exception("bug: worker %d cannot continue", os.getpid())
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()  # os._exit does not call it
            os._exit(status)

    # Exit

    def reap(self) -> Iterator[Failure]:
        """Reap all children that have exited. Those that were workers of the generation and were
        not accepting connections yet are failures. As process 1 of a container, the supervisor may
        also have children that it did not start."""
        while self:
            pid, status = os.waitpid(-1, os.WNOHANG)
            self._keepers.bind(self._workers)
            if not pid:
                break
            if dead := self._workers.pop(pid, None):
                if failure := self._handle_exit(dead, os.waitstatus_to_exitcode(status)):
                    yield failure
            elif not self._keepers.reaped(pid):
                self._replace_keeper(pid)

    def _replace_keeper(self, pid: int) -> None:
        for worker in self._workers.values():
            if pid in (worker.keeper, worker.slot.numbers[KEEPER]):
                worker.replace_keeper()

    def _handle_exit(self, dead: WorkerProcess, status: int) -> Failure | None:
        healthy, accepting, left = dead.is_healthy, dead.is_accepting, dead.slot.numbers[OPEN]
        kept = self._keepers.leave(dead, status)
        if dead.order:
            log.debug("worker %d has exited", dead.pid, extra=fields(TCPUPPERD_WORKER=dead.pid))
            return None
        if not dead.killed_because:
            self._count(WORKERS_DIED_EXIT if status >= 0 else WORKERS_DIED_SIGNAL)
        extra = Event.WORKER_DIED.fields(TCPUPPERD_WORKER=dead.pid)
        how = dead.killed_because or signals.describe(status)
        what = f"worker {dead.pid} {how}"
        if self._is_current(dead) and not accepting:
            return self._failed(f"{what} before it could accept connections", extra)
        if healthy:
            self.backoff.reset()
            what += f"; {counted(left, 'connection')} {'left to its keeper' if kept else 'lost'}"
            log.warning("%s, starting a replacement", what, extra=extra)
        else:
            self.log_failure(self._failed(f"{what} before it had served a client", extra))
        return None

    def _failed(self, message: str, extra: Extra) -> Failure:
        """Delay the next attempt, each time longer."""
        self.backoff.fail()
        return Failure(message, extra)

    def log_failure(self, failure: Failure) -> None:
        """Log a failure that another attempt will follow; only the first one is a warning."""
        level = logging.DEBUG if self.backoff.failures > 1 else logging.WARNING
        text = "%s; will retry at increasing intervals"
        log.log(level, text, failure.message, extra=failure.extra)

    # Orders

    def retire(self, order: Order, timeout: float, but: Generation | None = None) -> None:
        """Order all workers to exit, except those of one generation, and kill them after `timeout`
        seconds."""
        for worker in self._workers.values():
            if worker.generation is not but:
                worker.retire(order, timeout)

    def use_channel(self, channel: Channel) -> None:
        """Have all workers use another channel, except those that have been ordered to exit."""
        for worker in self._workers.values():
            worker.use_channel(channel)

    def close(self) -> None:
        """Close this process's ends of all control sockets. In a forked process, these are copies;
        if the supervisor closes its own because it exits, this is an order to the workers."""
        for worker in self._workers.values():
            worker.close()
        self._keepers.close()

    def kill_all(self) -> None:
        """Kill all workers."""
        for worker in self._workers.values():
            self._kill_late(worker)

    def kill_late(self) -> None:
        """Kill the workers and keepers that have not exited by their deadline."""
        self._keepers.act()
        for worker in self._workers.values():
            if worker.kill_at <= monotonic():
                self._kill_late(worker)

    def _kill_late(self, worker: WorkerProcess) -> None:
        # A worker that cannot even hand over is hung; one that drains may have slow clients.
        hung = worker.order in (Order.HAND_OVER, Order.HAND_OVER_WITH_QUEUES)
        event = Event.WORKER_HUNG if hung else Event.ANSWERS_CUT_OFF
        connections = counted(worker.slot.numbers[OPEN], "connection")
        text = f"killing worker {worker.pid}, which still has {connections}"
        self._kill(
            worker, WORKERS_DIED_KILL_TIMEOUT, "was killed because it did not exit", event, text
        )

    def watch(self) -> bool:
        """Kill workers whose heartbeat has stopped, if a check is due; return whether it was."""
        if monotonic() < self._watchdog.check_at:
            return False
        for worker in self._watchdog.hung(self._workers.values()):
            text = f"worker {worker.pid} is not responding, killing it"
            because = "was killed because it was not responding"
            self._kill(worker, WORKERS_DIED_HUNG, because, Event.WORKER_HUNG, text)
        return True

    def _kill(
        self, worker: WorkerProcess, field: int, because: str, event: Event, text: str
    ) -> None:
        """Kill a worker, count it and log why, but only once, however long it takes to die."""
        if worker.killed_because:
            return
        level = logging.ERROR if field == WORKERS_DIED_HUNG else logging.WARNING
        log.log(level, "%s", text, extra=event.fields(TCPUPPERD_WORKER=worker.pid))
        self._count(field)
        worker.kill(because)

    def _count(self, field: int) -> None:
        self._scoreboard.count(field)
