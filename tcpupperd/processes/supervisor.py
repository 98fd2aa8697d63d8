"""The supervisor, which starts, watches, replaces, reloads and stops the workers."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable
from io import FileIO
from time import monotonic
from typing import NoReturn

from tcpupperd.config import WORKERS_MAX, Config, ConfigError
from tcpupperd.errors import ExpectedError
from tcpupperd.events import Event, Extra, fields
from tcpupperd.host import descriptors, messages
from tcpupperd.host.notify import Notifier
from tcpupperd.host.sockets import ListenError, Listeners
from tcpupperd.processes import signals, worker
from tcpupperd.processes.conflicts import conflicts
from tcpupperd.processes.scoreboard import (
    LEAVES,
    LONGEST_LINE,
    LOST,
    RESTARTS,
    WORKERS_EXITED,
    WORKERS_HUNG,
    WORKERS_LATE,
    WORKERS_SIGNALLED,
    Scoreboard,
    Slot,
)
from tcpupperd.processes.source import Source
from tcpupperd.processes.store import Store
from tcpupperd.processes.worker_process import WorkerProcess
from tcpupperd.serving import turn
from tcpupperd.serving.counters import OPEN
from tcpupperd.words import counted

log = logging.getLogger(__name__)

#: Delays, in seconds, before the next attempt after a worker died without serving a client: the
#: first and the longest. Each delay is twice the previous one.
RETRY_FIRST, RETRY_LAST = 0.1, 10.0

#: Seconds that a worker is given in addition to drain_timeout before it is killed.
GRACE = 1.0

#: Exit status of a worker that hit a bug: EX_SOFTWARE in sysexits.h.
EX_SOFTWARE = 70


class StartError(ExpectedError):
    """The first workers cannot start."""


class Supervisor:
    """Keeps the configured number of workers running, and acts on signals.

    It waits for signals and for its next deadline. SIGCHLD means that a worker has exited or, if a
    worker has sent it, that the worker is accepting connections. After each wake-up, the state of
    the workers determines what to do.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        listeners: Listeners,
        notifier: Notifier,
        store: Store,
    ) -> None:
        self._config = config
        self._source = source
        self._listeners = listeners
        self._notifier = notifier
        self._store = store
        self._scoreboard = Scoreboard(4 * WORKERS_MAX)
        self._scoreboard.put(RESTARTS, store.restarts)
        self._workers: dict[int, WorkerProcess] = {}
        self._generation = 1
        # The configuration to fall back to during a reload, or while the first workers start with
        # a configuration other than the last good one.
        last_good = None if source.trouble else source.last_good()
        differs = last_good and vars(last_good) != vars(config)
        self._before_reload = (last_good, 0) if last_good and differs else None
        for one in (config, last_good or config):
            self._scoreboard.raise_to(LONGEST_LINE, one.max_line)
        self._reload_wanted = False
        self._trouble = source.trouble  # for the end of the status line
        self._started: Callable[[], None] = lambda: None
        self._ready = False
        self._stop_at = math.inf  # when shutdown_delay ends
        self._stopping = False
        self._order = worker.DRAIN  # the order given to the workers when stopping
        self._take_back = False  # whether to take connections back out of the channel
        self._store_failed = False
        self._early_deaths = 0
        self._retry_at = 0.0
        self._next_watch = 0.0 if notifier.watchdog_interval else math.inf
        self._awake_since = 0.0  # when the supervisor last woke up late

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Serve until told to stop; call `started` once all workers are accepting. Raises
        StartError if the first workers cannot start."""
        self._started = started
        signals.block()
        descriptors.raise_limit()
        gc.freeze()  # existing objects stay shared with the workers
        self._store.watch()
        try:
            self._manage()
            self._go_on()
        except StartError:
            if self._store.keeps:  # put back what the first workers have already taken over
                self._stop(worker.STORE)
                self._go_on()
            raise
        finally:
            self._kill(self._workers.values())

    def _go_on(self) -> None:
        while self._workers or not self._stopping:
            self._dispatch(self._wait())
            self._manage()

    def _wait(self) -> int | None:
        """Wait for the next signal; None if something else is due."""
        return signals.fetch(min(self._deadlines()) - monotonic())

    def _deadlines(self) -> list[float]:
        retry = self._retry_at if self._missing() else math.inf
        kills = (one.kill_at for one in self._workers.values())
        return [retry, self._next_watch, self._stop_at, *kills]

    def _dispatch(self, signal_number: int | None) -> None:
        match signal_number:
            case signal.SIGTERM | signal.SIGINT:
                self._leave()
            case signal.SIGUSR2 if self._store.keeps:
                self._stop(worker.STORE)
            case signal.SIGUSR2:
                self._leave()
            case signal.SIGHUP:
                self._reload_wanted = True
            case signal.SIGUSR1:
                self._log_counters()

    def _manage(self) -> None:
        """Do everything that the state of the workers calls for."""
        self._reap()
        self._watch()
        self._check_store()
        if self._stop_at <= monotonic():
            self._stop(worker.DRAIN)
        if self._reload_wanted and self._ready and not self._before_reload and not self._leaving:
            self._begin_reload()
        while self._missing() and monotonic() >= self._retry_at:
            self._start_worker()
        if not self._stopping and self._all_accept():
            self._settled()
        if self._take_back and not self._workers:
            self._end_what_was_kept()
        self._kill(one for one in self._workers.values() if one.kill_at <= monotonic())

    # Workers

    def _current(self) -> list[WorkerProcess]:
        """The workers that serve with the current configuration."""
        return [
            one
            for one in self._workers.values()
            if one.generation == self._generation and not one.retired
        ]

    def _missing(self) -> int:
        """The number of workers to start."""
        if self._stopping or self._falling_back():
            return 0
        return self._config.worker_count - len(self._current())

    def _falling_back(self) -> bool:
        """Whether the first workers have failed to start and are exiting. New ones have to wait,
        because the number of processes may be limited."""
        return not self._ready and any(one.retired for one in self._workers.values())

    def _all_accept(self) -> bool:
        accepting = sum(one.accepting for one in self._current())
        return accepting >= self._config.worker_count

    def _start_worker(self) -> None:
        slot = self._scoreboard.claim()
        try:
            pid, control = self._fork(slot)
        except OSError as error:
            self._scoreboard.release(slot)
            extra = Event.WORKER_REPLACED.fields(ERRNO=error.errno)
            self._cannot_start(f"cannot start a worker: {error.strerror}", extra)
        else:
            self._workers[pid] = WorkerProcess(pid, slot, control, self._generation)

    def _fork(self, slot: Slot) -> tuple[int, int]:
        """Fork a worker; return its process ID and the supervisor's end of its control pipe."""
        orders, control = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(orders)
            os.close(control)
            raise
        if not pid:
            os.close(control)
            self._be_worker(slot, orders)
        os.close(orders)
        return pid, control

    def _be_worker(self, slot: Slot, orders: int) -> NoReturn:
        status = EX_SOFTWARE
        try:
            for other in self._workers.values():
                other.let_go()
            self._listeners.narrow(self._config.listen)  # a reload may have removed an address
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT})
            worker.run(
                worker.WorkerContext(
                    config=self._config,
                    instance=self._source.instance,
                    listeners=list(self._listeners),
                    listeners_outlive_us=self._listeners.passed,
                    channel=(self._store.channel.give, self._store.channel.take),
                    channel_outlives_us=lambda: self._store.keeps,
                    control=FileIO(orders),
                    numbers=slot.numbers,
                    scoreboard=self._scoreboard,
                    heartbeat=self._notifier.watchdog_interval / 4,
                    path=self._source.path,
                )
            )
            status = 0
        except BaseException:
            log.exception("bug: worker %d cannot continue", os.getpid())
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()  # os._exit does not call it
            os._exit(status)

    def _reap(self) -> None:
        """Reap all children that have exited. As process 1 of a container, the supervisor may
        inherit others."""
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid in self._workers:
                self._bury(self._workers.pop(pid), os.waitstatus_to_exitcode(status))

    def _bury(self, dead: WorkerProcess, status: int) -> None:
        accepted, served, retired = dead.accepting, dead.served, dead.retired
        lost = dead.slot.numbers[OPEN]
        dead.let_go()
        self._scoreboard.release(dead.slot)
        self._scoreboard.count(LOST, lost)
        if retired:
            log.debug("worker %d has exited", dead.pid, extra=fields(TCPUPPERD_WORKER=dead.pid))
            return
        if not dead.killed:
            self._count(WORKERS_EXITED if status >= 0 else WORKERS_SIGNALLED)
        extra = Event.WORKER_REPLACED.fields(TCPUPPERD_WORKER=dead.pid)
        how = f"worker {dead.pid} {signals.describe(status)}"
        if dead.generation == self._generation and not accepted:
            self._cannot_start(f"{how} before it could accept connections", extra)
        elif served:
            self._early_deaths, self._retry_at = 0, 0.0
            ended = counted(lost, "connection")
            log.warning("%s; %s lost, starting a replacement", how, ended, extra=extra)
        else:
            self._try_later(f"{how} before it had served a client", extra)

    def _cannot_start(self, why: str, extra: Extra) -> None:
        """Handle a worker of the current configuration that died before accepting."""
        if self._before_reload:
            self._abandon_reload(why)
        elif not self._ready:
            raise StartError(why)
        else:
            self._try_later(why, extra)

    def _try_later(self, why: str, extra: Extra) -> None:
        """Schedule another attempt, with increasing delays; only the first failure is logged as a
        warning."""
        delay = min(RETRY_LAST, RETRY_FIRST * 2**self._early_deaths)
        self._retry_at = monotonic() + delay
        level = logging.DEBUG if self._early_deaths else logging.WARNING
        log.log(level, "%s; will retry at increasing intervals", why, extra=extra)
        self._early_deaths = min(self._early_deaths + 1, 30)
        self._tell_status()

    def _kill(self, workers: Iterable[WorkerProcess]) -> None:
        for one in workers:
            served = counted(one.slot.numbers[OPEN], "connection")
            log.warning(
                "killing worker %d, which still has %s",
                one.pid,
                served,
                extra=Event.DRAIN_CUT_SHORT.fields(TCPUPPERD_WORKER=one.pid),
            )
            self._count(WORKERS_LATE)
            one.kill()

    # Reload

    def _begin_reload(self) -> None:
        self._reload_wanted = False
        self._notifier.reloading()
        try:
            config = self._source.load()
            self._listeners.bind(config.listen)
        except (ConfigError, ListenError) as error:
            self._reload_failed(str(error))
            return
        self._before_reload = self._config, self._generation
        self._config = config
        self._scoreboard.raise_to(LONGEST_LINE, config.max_line)
        self._generation += 1
        messages.set_level(config.log_level)

    def _abandon_reload(self, why: str) -> None:
        """Go back to the previous configuration and its workers."""
        assert self._before_reload
        failed = self._current()
        self._config, self._generation = self._before_reload
        self._before_reload = None
        if self._ready:
            self._retire(failed, worker.GIVE)
            self._reload_failed(why)
            return
        self._retire(failed, worker.STORE)
        self._source.complain(why)
        self._trouble = self._source.trouble
        self._listeners.bind(self._config.listen)
        messages.set_level(self._config.log_level)

    def _reload_failed(self, why: str) -> None:
        self._scoreboard.reload_ended(failed=True)
        for line in why.splitlines():
            extra = Event.RELOAD_REFUSED.fields()
            log.error("reload failed, keeping the current configuration: %s", line, extra=extra)
        self._trouble = self._source.trouble or "the last reload failed; see the log"
        self._listeners.keep(self._config.listen)
        self._notifier.ready()
        self._tell_status()

    def _settled(self) -> None:
        """Complete a start or reload, once all workers of the current configuration are
        accepting."""
        if self._ready and not self._before_reload:
            self._tell_status()  # a worker may have been replaced
            return
        dropped = self._listeners.keep(self._config.listen)
        if self._ready:
            self._trouble = self._source.trouble = ""
            self._scoreboard.reload_ended(failed=False)
        self._source.keep(self._config)
        self._scoreboard.loaded(self._source.in_force)
        event = Event.RELOADED if self._ready else Event.READY
        log.info(
            "%s: %s, %s, listening on %s",
            event.name.lower(),
            counted(self._config.worker_count, "worker"),
            turn.implementation,
            self._listeners,
            extra=event.fields(),
        )
        passed, kept = self._listeners.passed, self._store.keeps
        for level, text in conflicts(self._config, passed=passed, kept=kept):
            log.log(level, "%s", text)
        order = worker.GIVE_WITH_QUEUES if dropped else worker.GIVE
        self._retire((w for w in self._workers.values() if w not in self._current()), order)
        self._before_reload = None
        self._notifier.ready()
        self._tell_status()
        if not self._ready:
            self._ready = True
            self._started()

    # Stop

    @property
    def _leaving(self) -> bool:
        """Whether the daemon is stopping or about to stop."""
        return self._stopping or self._stop_at < math.inf

    def _leave(self) -> None:
        """Stop; with shutdown_delay, after that time or on a second signal. Until then, clients
        are served, and the agent tells load balancers to send new ones elsewhere."""
        delay = self._config.shutdown_delay
        if not delay or not self._ready or self._leaving:
            self._stop(worker.DRAIN)
            return
        self._stop_at = monotonic() + delay
        self._scoreboard.put(LEAVES, True)
        self._notifier.stopping()
        self._notifier.extend_timeout(delay + self._config.drain_timeout + 2 * GRACE)
        log.info("stopping in %g s (shutdown_delay), or on a second signal", delay)
        self._tell_status()

    def _stop(self, order: bytes) -> None:
        if self._stopping:
            self._stop_again(order)
            return
        self._stop_at = math.inf
        self._stopping = True
        self._order = order
        self._notifier.stopping()
        self._notifier.extend_timeout(self._config.drain_timeout + 2 * GRACE)
        log.info(
            "stopping: %s %s",
            "handing over" if order == worker.STORE else "closing",
            counted(self._scoreboard.totals()["open"], "connection"),
        )
        self._tell_status()
        self._retire(self._workers.values(), order)
        self._listeners.keep(())  # so that no client connects once the workers stop accepting

    def _stop_again(self, order: bytes) -> None:
        """Handle a second order to stop: a stop after a stop is immediate, and a stop during a
        restart closes the connections that were being kept."""
        if order == worker.STORE:
            return
        if self._order == worker.DRAIN:
            log.warning("second stop signal: stopping immediately")
            self._kill(self._workers.values())
            return
        log.info("told to stop during a restart: closing the connections that were being kept")
        self._order = worker.DRAIN
        self._take_back = True

    def _end_what_was_kept(self) -> None:
        """Start one more worker, to take all connections out of the channel and drain them."""
        self._take_back = False
        self._notifier.extend_timeout(self._config.drain_timeout + 2 * GRACE)
        self._start_worker()
        self._retire(self._workers.values(), worker.DRAIN)

    def _retire(self, workers: Iterable[WorkerProcess], order: bytes) -> None:
        for one in workers:
            one.retire(order, self._config.drain_timeout + GRACE)

    # Watching and reporting

    def _watch(self) -> None:
        """Send a keep-alive notification, and kill workers whose heartbeat has stopped.

        If the supervisor itself woke up late, for example because the whole service was suspended,
        the workers are given a full interval again: time during which nothing ran does not count.
        """
        now, interval = monotonic(), self._notifier.watchdog_interval
        if now < self._next_watch:
            return
        if self._next_watch and now - self._next_watch > interval / 4:
            self._awake_since = now
        # sd_watchdog_enabled(3) recommends half the interval, but wake-ups are always a bit late.
        self._next_watch = now + interval / 3
        self._notifier.watchdog()
        self._tell_status()
        for one in self._workers.values():
            # Measured at the time of the check, because the supervisor, too, may be suspended in
            # between.
            if min(one.silent_for(now), now - self._awake_since) > interval:
                log.error(
                    "worker %d is not responding, killing it",
                    one.pid,
                    extra=Event.WORKER_HUNG.fields(TCPUPPERD_WORKER=one.pid),
                )
                self._count(WORKERS_HUNG)
                one.kill()

    def _check_store(self) -> None:
        """Log once if the service manager does not keep descriptors although it claims to."""
        if self._store.has_failed and not self._store_failed:
            self._store_failed = True
            log.warning(
                "the service manager does not keep file descriptors, so a restart will close all"
                " connections; set FileDescriptorStoreMax=8 in the unit, or FDSTORE=0 in its"
                " environment"
            )
            self._tell_status()

    def _tell_status(self) -> None:
        totals = self._scoreboard.totals()
        serving = f"{'Stopping shortly, l' if self._leaving else 'L'}istening on {self._listeners}"
        parts = [
            "Stopping" if self._stopping else serving,
            f"{counted(len(self._workers), 'worker')}, {counted(totals['open'], 'connection')}",
            f"{counted(totals['lines'], 'line')} answered",
        ]
        if died := self._scoreboard.deaths():
            parts.append(f"{counted(died, 'worker')} died")
        if self._source.is_stale:
            parts.append(f"{self._source.path} changed on disk; reload to apply it")
        if self._early_deaths and self._missing():
            attempts = counted(self._early_deaths, "attempt")
            parts.append(f"a worker cannot be started ({attempts})")
        if self._store_failed:
            parts.append(
                "a restart will close all connections: the descriptor store does not work"
            )
        if self._trouble:
            parts.append(self._trouble)
        self._notifier.status("; ".join(parts))

    def _count(self, field: int) -> None:
        self._scoreboard.count(field)

    def _log_counters(self) -> None:
        counters = self._scoreboard.totals() | self._scoreboard.events()
        log.info("counters: %s", " ".join(f"{name}={count}" for name, count in counters.items()))
        self._tell_status()
