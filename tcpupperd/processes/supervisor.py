"""The supervisor: decides what the workers do. Its table is its whole behaviour."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from enum import Enum, auto
from time import monotonic
from typing import ClassVar

from outlive import descriptors
from outlive.notify import Notifier
from tcpupperd.config_file import ConfigError
from tcpupperd.errors import ExpectedError
from tcpupperd.events import Event
from tcpupperd.host.sockets import ListenError
from tcpupperd.processes import worker
from tcpupperd.processes.conflicts import conflicts
from tcpupperd.processes.fleet import Failure, Fleet
from tcpupperd.processes.generation import Generation
from tcpupperd.processes.orders import Order
from tcpupperd.processes.process_name import show_line
from tcpupperd.processes.reloading import COMPLETE, FAILED, Requester
from tcpupperd.processes.rollout import Rollout
from tcpupperd.processes.scoreboard import Scoreboard, Slot
from tcpupperd.processes.signals import Signals, block_aborts
from tcpupperd.processes.status_line import Status
from tcpupperd.processes.store import Store
from tcpupperd.serving import fast_path
from tcpupperd.serving.counters import LONGEST_LINE, RESTARTS, STOPPING_SOON
from tcpupperd.settings import WORKERS_MAX
from tcpupperd.words import counted

log = logging.getLogger(__name__)

#: Seconds in addition to drain_timeout before a worker is killed.
GRACE = 1.0

#: Seconds that the workers of a new configuration have until they accept connections. A start has
#: no such limit, because a service manager has one (TimeoutStartSec=).
RELOAD_TIMEOUT = 60.0


class StartError(ExpectedError):
    """The first workers cannot start."""


class State(Enum):
    """What the supervisor is doing: a column of the table."""

    STARTING = 0  # the first workers start
    RETURNING = 1  # they failed; once they have exited, those of the last good generation start
    SERVING = 2
    RELOADING = 3  # the workers of a new generation start, those of the previous one serve
    LEAVING = 4  # shutdown_delay: serving, while load balancers send new clients elsewhere
    KEEPING = 5  # a restart: the workers leave their connections for the next process
    STOPPING = 6  # the workers close their connections; then, another one those in the channel
    ENDING = 7  # the same, but no other worker is started
    GONE = 8  # there is nothing left to do


class Input(Enum):
    """What can happen: a row of the table. Some are conditions rather than events: they are acted
    on at each check for as long as they last."""

    STOP = auto()  # SIGTERM, SIGINT; SIGUSR2 if nothing keeps connections
    RESTART = auto()  # SIGUSR2, and the store keeps connections for the next process
    RELOAD = auto()  # SIGHUP
    COMPLETE = auto()  # as long as all workers of the generation accept connections
    FAILURE = auto()  # one of them cannot start
    DUE = auto()  # the time that the state may take has passed
    EMPTY = auto()  # as long as there is no worker
    LOST = auto()  # as long as the store keeps nothing


class Supervisor:
    """Acts on signals, on what becomes of the workers, and on the clock.

    It waits for signals and for its next deadline. SIGCHLD means that a worker has exited or, if a
    worker has sent it, that the worker accepts connections. After each wake-up, it checks what has
    happened, and does what the table says. If it fails itself, its exit closes the control
    sockets, which is an order to the workers: a failure costs no more than SIGKILL would.
    """

    def __init__(self, rollout: Rollout, notifier: Notifier, store: Store) -> None:
        self.state = State.STARTING
        self._due_at = math.inf  # when the state has lasted as long as it may
        self._failure = Failure("", {})  # the last one
        self._error: StartError | None = None  # to be raised at the end
        self._rollout = rollout
        self._listeners = rollout.listeners
        self._notifier = notifier
        self._store = store
        self._scoreboard = Scoreboard(4 * WORKERS_MAX)
        self._scoreboard.put(RESTARTS, store.restarts)
        if rollout.previous:  # whose longest line may be handed over
            self._scoreboard.raise_to(LONGEST_LINE, rollout.previous.config.max_line)
        self._fleet = Fleet(self._scoreboard, self._work, notifier.watchdog_interval)
        self._status = Status(rollout, self._fleet, self._scoreboard, store)
        self._requester = Requester()  # of a reload

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Serve until told to stop; call `started` once all workers accept connections. Raises
        StartError if the first workers cannot start."""
        self._started = started
        self._signals = Signals()
        self._manager = os.getppid()
        descriptors.raise_limit()
        gc.freeze()  # existing objects stay shared with the workers
        self._store.watch()
        self._fleet.serve(self._rollout.generation)
        try:
            for happened in self._inputs():
                self._step(happened)(self)
                if self.state is State.GONE:
                    break
        finally:
            self._fleet.close()
        if self._error:
            raise self._error

    def _step(self, happened: Input) -> Callable[[Supervisor], None]:
        return self.TABLE[happened][self.state.value]

    def _inputs(self) -> Iterator[Input]:
        """Everything that happens, in turn. Each input is acted on before the next check."""
        while True:
            yield from self._deaths()
            if self._fleet.watch():
                self._notifier.watchdog()
            self._mend_channel()
            self._store.check()
            if not self._store.keeps:
                yield Input.LOST
            if self._due_at <= monotonic():
                yield Input.DUE
            if failed := self._fleet.fill():
                self._failure = failed
                yield Input.FAILURE
            if self._fleet.is_complete:
                yield Input.COMPLETE
            if not self._fleet:
                yield Input.EMPTY
            self._fleet.kill_late()
            self._report()
            yield from self._signal()

    def _deaths(self) -> Iterator[Input]:
        for failure in self._fleet.reap():
            self._failure = failure
            yield Input.FAILURE

    def _signal(self) -> Iterator[Input]:
        """Wait for a signal, or until something is due. A deferred signal stays pending."""
        deferred = {signal.SIGHUP} if self._step(Input.RELOAD) is Supervisor.defer else set()
        until = min(self._fleet.next_wake, self._due_at, self._store.check_at)
        number = self._signals.fetch(until - monotonic(), but=deferred)
        # SIGCHLD is fetched after the other signals. Before they are acted on, the keepers of the
        # workers that were dead by then are told to hand over.
        yield from self._deaths()
        match number:
            case signal.SIGTERM | signal.SIGINT:
                yield Input.STOP
            case signal.SIGUSR2:
                yield Input.RESTART if self._store.keeps else Input.STOP
            case signal.SIGHUP:
                self._requester.ask(self._signals.sender)
                yield Input.RELOAD
            case signal.SIGUSR1:
                self._log_counters()

    def _mend_channel(self) -> None:
        if self._store.mend_channel():
            text = "a process shut the handover channel down; using a new one"
            log.error("%s", text, extra=Event.CHANNEL_REPLACED.fields())
            self._fleet.use_channel(self._store.channel)

    def _enter(self, state: State, lasting: float = math.inf) -> None:
        """Enter a state, which may last for `lasting` seconds."""
        self.state = state
        self._due_at = monotonic() + lasting

    # Start

    def settle(self) -> None:
        """All workers of the generation accept connections: the others may exit."""
        generation, first = self._rollout.generation, self.state is State.STARTING
        dropped = self._rollout.complete()
        if not first:
            self._scoreboard.reload_ended(failed=False)
        self._scoreboard.loaded(generation.file)
        self._log_ready(Event.READY if first else Event.RELOADED)
        order = Order.HAND_OVER_WITH_QUEUES if dropped else Order.HAND_OVER
        self._fleet.retire(order, self._exit_timeout, but=generation)
        self._enter(State.SERVING)
        self._notifier.ready()
        if first:
            self._started()

    def _log_ready(self, event: Event) -> None:
        config, passed = self._rollout.generation.config, self._listeners.passed
        log.info(
            "%s: %s, %s, listening on %s",
            event.name.lower(),
            counted(config.worker_count, "worker"),
            fast_path.implementation,
            self._listeners,
            extra=event.fields(),
        )
        for level, text in conflicts(config, passed=passed, kept=self._store.keeps):
            log.log(level, "%s", text)

    def fall_back(self) -> None:
        """The first workers cannot start: use the last good generation, or give up. Its workers
        are not started before the first ones have exited, because the number of processes may be
        limited."""
        if not self._rollout.previous:
            self._error = StartError(self._failure.message)
            if self._store.keeps:  # put back what the first workers have already taken over
                self.keep()
            else:
                self.stop()
            return
        self._rollout.source.log_fallback(self._failure.message)
        self._fleet.serve(None)
        self._fleet.retire(Order.LEAVE_IN_STORE, self._exit_timeout)
        self._enter(State.RETURNING)

    def start_over(self) -> None:
        self._rollout.undo()
        self._fleet.serve(self._rollout.generation)
        self._enter(State.STARTING)

    def retry(self) -> None:
        self._fleet.log_failure(self._failure)

    # Reload

    def reload(self) -> None:
        self._notifier.reloading()
        try:
            self._rollout.begin()
        except (ConfigError, ListenError) as error:
            self._reject(str(error))
            return
        self._fleet.serve(self._rollout.generation)
        self._enter(State.RELOADING, RELOAD_TIMEOUT)

    def abandon(self) -> None:
        self._go_back(self._failure.message)

    def time_out(self) -> None:
        self._go_back(f"the new workers did not accept connections within {RELOAD_TIMEOUT:g} s")

    def _go_back(self, why: str) -> None:
        """Return to the previous generation and its workers."""
        self._rollout.undo()
        generation = self._rollout.generation
        self._fleet.serve(generation, after_failure=True)
        self._fleet.retire(Order.HAND_OVER, self._exit_timeout, but=generation)
        self._reject(why)

    def _reject(self, why: str) -> None:
        self._scoreboard.reload_ended(failed=True)
        for line in why.splitlines():
            text = "reload failed, keeping the current configuration: %s"
            log.error(text, line, extra=Event.RELOAD_REFUSED.fields())
        self._enter(State.SERVING)
        self._notifier.ready()
        self._requester.answer(FAILED)

    def decline(self) -> None:
        log.warning("not reloading, because the daemon is about to stop")
        self._requester.answer(FAILED)

    # Stop

    @property
    def _exit_timeout(self) -> float:
        """Seconds that a worker has to exit."""
        return self._rollout.generation.config.drain_timeout + GRACE

    def leave(self) -> None:
        """Stop after shutdown_delay, or when told again. Meanwhile, clients are served, and the
        agent tells load balancers to send new ones elsewhere."""
        delay = self._rollout.generation.config.shutdown_delay
        if not delay:
            self.stop()
            return
        if self.state is State.RELOADING:
            self._go_back("told to stop")
        self._scoreboard.put(STOPPING_SOON, True)
        self._notifier.stopping()
        self._notifier.extend_timeout(delay + self._exit_timeout + GRACE)
        log.info("stopping in %g s (shutdown_delay), or on a second signal", delay)
        self._enter(State.LEAVING, delay)

    def stop(self) -> None:
        log.info("stopping: closing %s", self._open())
        self._dismiss(State.STOPPING, Order.DRAIN, self._exit_timeout + GRACE)

    def keep(self) -> None:
        self._mend_channel()
        log.info("stopping: handing over %s", self._open())
        self._dismiss(State.KEEPING, Order.LEAVE_IN_STORE)

    def _dismiss(self, state: State, order: Order, lasting: float = math.inf) -> None:
        if self.state is not State.LEAVING:  # otherwise the service manager already knows
            self._notifier.stopping()
        self._notifier.extend_timeout(self._exit_timeout + GRACE)
        self._fleet.serve(None)
        self._fleet.retire(order, self._exit_timeout)
        self._listeners.keep_only(())  # so that no client connects once the workers do not accept
        self._enter(state, lasting)

    def recall(self) -> None:
        why = "told to stop" if self._store.keeps else "the store was lost"
        log.info("%s during a restart: closing the connections that were being kept", why)
        self._enter(State.STOPPING, self._exit_timeout + GRACE)

    def finish(self) -> None:
        """End, unless there are connections in the channel: a restart has become a stop, or the
        keeper of a worker that was killed has put them there."""
        if self._store.holds_connections:
            self._close_kept()
        else:
            self.end()

    def _close_kept(self) -> None:
        """Start one more worker, which takes all connections out of the channel and closes
        them."""
        self._notifier.extend_timeout(self._exit_timeout + GRACE)
        if failure := self._fleet.start(self._rollout.generation):
            log.error(
                "the connections that were being kept are lost: %s",
                failure.message,
                extra=failure.extra,
            )
            self.end()
        self._fleet.retire(Order.DRAIN, self._exit_timeout)

    def hurry(self) -> None:
        log.warning("second stop signal: stopping immediately")
        self._fleet.kill_all()
        self._enter(State.ENDING)

    def give_up(self) -> None:
        """Try no more to close what is in the channel: it may kill each worker that does."""
        self._enter(State.ENDING)

    def end(self) -> None:
        self._enter(State.GONE)

    def defer(self) -> None:
        """Do nothing: the signal stays pending, see `_signal`."""

    def no(self) -> None:
        """Do nothing: what happened calls for nothing, or it cannot happen in this state."""

    # Reports

    def _report(self) -> None:
        """Send the status, and answer whoever asked for a reload once no previous worker accepts
        connections."""
        if self.state is State.SERVING and self._fleet.retired_have_stopped:
            self._requester.answer(COMPLETE)
        if self.state not in (State.STARTING, State.RETURNING):  # the first one follows READY=1
            self._notifier.status(self._status.line(self._activity()))

    def _open(self) -> str:
        return counted(self._scoreboard.open(), "connection")

    def _activity(self) -> str:
        if self.state in (State.KEEPING, State.STOPPING, State.ENDING):
            return "Stopping"
        leaving = self.state is State.LEAVING
        return f"{'Stopping shortly, l' if leaving else 'L'}istening on {self._listeners}"

    def _log_counters(self) -> None:
        counters = self._scoreboard.totals() | self._scoreboard.events()
        log.info("counters: %s", " ".join(f"{name}={count}" for name, count in counters.items()))

    # In a process that was forked

    def _work(self, generation: Generation, slot: Slot, orders: int) -> None:
        """Run as a worker."""
        source = self._rollout.source
        show_line("tcpupperd: worker")
        # A reload may have removed an address.
        self._listeners.close_others_in_worker(generation.config.listen)
        if self._notifier.watchdog_interval:
            block_aborts()
        worker.run(
            worker.WorkerContext(
                config=generation.config,
                instance=source.instance,
                listeners=list(self._listeners),
                listeners_outlive_us=self._listeners.passed,
                channel=(self._store.channel.send_end, self._store.channel.receive_end),
                channel_outlives_us=lambda: self._store.keeps,
                control=socket.socket(fileno=orders),
                numbers=slot.numbers,
                is_first=slot.row == 0,
                scoreboard=self._scoreboard,
                heartbeat=self._notifier.watchdog_interval / 4,
                manager=self._manager,
                path=source.path,
            )
        )

    #: What the supervisor does, by what has happened (rows) and its state (columns, as in State).
    # fmt: off
    TABLE: ClassVar[dict[Input, tuple[Callable[[Supervisor], None], ...]]] = {
        #               STARTING   RETURNING   SERVING RELOADING LEAVING KEEPING STOPPING  ENDING
        Input.STOP:     (stop,      recall,     leave,  leave,    stop,   recall, hurry,    hurry),
        Input.RESTART:  (keep,      keep,       keep,   keep,     keep,   no,     no,       no),
        Input.RELOAD:   (defer,     defer,      reload, defer,    decline, no,    no,       no),
        Input.COMPLETE: (settle,    no,         no,     settle,   no,     no,     no,       no),
        Input.FAILURE:  (fall_back, no,         retry,  abandon,  retry,  no,     no,       no),
        Input.DUE:      (no,        no,         no,     time_out, stop,   no,     give_up,  no),
        Input.EMPTY:    (no,        start_over, no,     no,       no,     end,    finish,   end),
        Input.LOST:     (no,        no,         no,     no,       no,     recall, no,       no),
    }
    # fmt: on
