"""The supervisor in all sequences of what can happen to it, without processes or waiting.

The real `run()` is driven by a world of its own: a clock, fork, waitpid, signals, a service
manager and a configuration file.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from integration.measures import scaled
from tcpupperd.config import Config
from tcpupperd.config_file import ConfigError
from tcpupperd.events import Event
from tcpupperd.host import messages
from tcpupperd.processes import backoff, fleet, status_line, supervisor, watchdog, worker_process
from tcpupperd.processes.generation import Generation
from tcpupperd.processes.keepers import Keepers
from tcpupperd.processes.orders import Order
from tcpupperd.processes.rollout import Rollout
from tcpupperd.processes.source import generation_of
from tcpupperd.processes.supervisor import Input, State, Supervisor
from tcpupperd.processes.worker_process import WorkerProcess
from tcpupperd.serving.counters import ACCEPTING, HEARTBEAT, STATE

#: What happens after the start, in all sequences of this length; SOAK=1 makes them longer.
LENGTH = scaled(3, 4)

WORKERS = 2

#: Seconds; longer than any pause between attempts, any delay and the time for a reload.
LONG_TIME = 100.0

#: States in which the supervisor keeps the options of its generation.
SERVES = (State.STARTING, State.SERVING, State.RELOADING, State.LEAVING)

#: States in which no worker takes over connections.
STOPS = (State.KEEPING, State.STOPPING, State.ENDING)


class NothingMoreError(Exception):
    """The sequence is over."""


class World:
    """Everything around a supervisor."""

    def __init__(
        self,
        *,
        keeps: bool = True,
        delay: float = 0,
        last_good: bool = False,
        watchdog_interval: float = 0.0,
    ) -> None:
        self.watchdog_interval = watchdog_interval
        self.now = 1000.0
        self.keeps = keeps
        self.delay = delay
        self.file_is_valid = True
        self.file_is_read = True  # since SIGHUP was last sent
        self.generations = itertools.count()
        self.notified: list[str] = []
        self.log_level = ""
        self.keepalive = math.nan
        self.addresses: set[str] = set()
        self.stored = self.generation("invalid") if last_good else None
        self.pids = itertools.count(1)
        self.dead: list[tuple[int, int]] = []  # and not yet waited for
        self.kills_at_once = True  # a process in uninterruptible sleep takes its time
        self.holds_connections = False  # the channel
        self.signalled: set[int] = set()  # processes that are dead or about to be
        self.early_death_at = -math.inf  # when a worker died that had not served
        self.pending: set[int] = set()
        self.orders: list[Order] = []
        self.sequence: Iterator[Callable[[], int | None]] = iter(())
        self.rollout = Rollout(self, self)  # type: ignore[arg-type]
        self.supervisor = Supervisor(self.rollout, self, self)  # type: ignore[arg-type]

    def run(self, sequence: list[str]) -> None:
        """Let all this happen, and run the supervisor until nothing happens any more."""
        self.sequence = iter([getattr(self, name) for name in sequence])
        self.supervisor.run()

    # The configuration, as Source has it

    path = "file"
    instance = ""

    def generation(self, problem: str = "") -> Generation:
        number = next(self.generations)
        config = Config(
            workers=WORKERS,
            log_level=("info", "warning")[number % 2],
            keepalive=float(number),
            shutdown_delay=self.delay,
            listen=("localhost:1", f"localhost:{number + 2}"),
        )
        return generation_of(config, (0, 0), problem)

    def load(self) -> Generation:
        self.file_is_read = True
        self.early_death_at = -math.inf  # another generation may be tried immediately
        if not self.file_is_valid:
            raise ConfigError("it is invalid")
        return self.generation()

    def last_good(self) -> Generation | None:
        return self.stored

    def log_fallback(self, error: object) -> None:
        pass

    def has_changed_on_disk(self, generation: Generation) -> bool:
        return False

    def keep(self, good: Generation) -> None:
        pass

    # Listeners

    passed = False
    socket = None

    def bind(self, addresses: tuple[str, ...]) -> None:
        self.addresses |= set(addresses)

    def keep_only(self, addresses: tuple[str, ...]) -> bool:
        dropped = self.addresses - set(addresses)
        self.addresses -= dropped
        return bool(dropped)

    def __iter__(self) -> Iterator[World]:
        return iter([self])

    def set_options(self, keepalive: float) -> None:
        self.keepalive = keepalive

    # Notifier and Store

    problem = ""
    restarts = 0

    def ready(self) -> None:
        self.notified.append("READY")

    def reloading(self) -> None:
        self.notified.append("RELOADING")

    def stopping(self) -> None:
        self.notified.append("STOPPING")

    def status(self, text: str) -> None:
        pass

    def watchdog(self) -> None:
        pass

    def extend_timeout(self, seconds: float) -> None:
        pass

    def watch(self) -> None:
        pass

    check_at = math.inf

    def check(self) -> None:
        pass

    def mend_channel(self) -> bool:
        return False

    # The system

    def fork(self, generation: Generation, slot: Any) -> tuple[int, int]:
        pid = next(self.pids)
        if self.supervisor.state is State.STOPPING:
            self.holds_connections = False  # it takes all of them
        elif self.supervisor.state is not State.STARTING:
            assert self.now > self.early_death_at, "a storm: no pause after a failure"
        return pid, pid + 1000

    def write(self, control: int, order: bytes) -> int:
        (told,) = (one for one in self.workers() if one.pid + 1000 == control)
        self.orders.append(Order(order))
        if Order(order) is Order.HAND_OVER:  # some worker has to take the connections
            others = [one for one in self.workers() if one is not told and not one.order]
            assert others or self.supervisor._fleet.missing
            assert told.generation is not self.rollout.generation
        return 1

    def kill(self, pid: int, number: int) -> None:
        assert pid not in self.signalled, "killed twice"
        self.signalled.add(pid)
        if self.kills_at_once:
            self.dead.append((pid, -number))

    def waitpid(self, pid: int, options: int) -> tuple[int, int]:
        if not self.dead:
            return 0, 0
        number, status = self.dead.pop(0)
        (dead,) = (worker for worker in self.workers() if worker.pid == number)
        left = dead.order is Order.LEAVE_IN_STORE or (status < 0 and not dead.was_cut_off)
        if left and self.supervisor.state in STOPS:
            self.holds_connections = True  # put there by it or by its keeper
        return number, status

    def fetch(self, timeout: float, *, but: Any = frozenset()) -> int | None:
        self.check_invariants()
        for number in self.pending - but:
            self.pending.remove(number)
            return int(number)
        if timeout <= 0:
            return None
        what = next(self.sequence, None)
        if what is None:
            raise NothingMoreError
        if number := what():
            self.pending.add(number)
        elif what == self.wait and timeout > LONG_TIME:  # nothing wakes it
            return self.fetch(timeout - LONG_TIME, but=but)
        return self.fetch(0.0, but=but)

    def workers(self) -> list[WorkerProcess]:
        return list(self.supervisor._fleet._workers.values())

    # What can happen

    def accept(self) -> None:
        """All workers accept connections."""
        for worker in self.workers():
            worker.slot.numbers[STATE] = ACCEPTING

    def die(self) -> None:
        """The newest worker that serves dies."""
        for worker in [one for one in self.workers() if not one.order][-1:]:
            if worker.pid not in self.signalled:
                if not worker.is_healthy:
                    self.early_death_at = self.now
                self.kill(worker.pid, signal.SIGKILL)

    def leave(self) -> None:
        """All workers that were told to exit do so."""
        for worker in self.workers():
            if worker.order and worker.pid not in self.signalled:
                self.kill(worker.pid, 0)

    def wait(self) -> None:
        self.now += LONG_TIME

    def hang(self) -> None:
        """Heartbeats stop, and for a while nothing ends the workers."""
        self.kills_at_once = False
        for worker in self.workers():
            worker.slot.numbers[HEARTBEAT] = 0

    def tick(self) -> int:
        self.now += self.watchdog_interval / 3
        return signal.SIGCHLD

    def reload(self) -> int:
        self.file_is_valid, self.file_is_read = True, False
        return signal.SIGHUP

    def reload_invalid(self) -> int:
        self.file_is_valid = self.file_is_read = False
        return signal.SIGHUP

    def term(self) -> int:
        return signal.SIGTERM

    def restart(self) -> int:
        return signal.SIGUSR2

    def die_before_term(self) -> int:
        self.die()
        return self.term()

    def die_before_restart(self) -> int:
        self.die()
        return self.restart()

    def lose_store(self) -> None:
        self.keeps = False

    # What must hold whenever the supervisor waits

    def check_invariants(self) -> None:
        state, generation = self.supervisor.state, self.rollout.generation
        staying = [worker for worker in self.workers() if not worker.order]
        ours = [worker for worker in staying if worker.generation is generation]
        assert len(ours) <= WORKERS, "a storm"
        assert len(staying) <= 2 * WORKERS
        if state is State.SERVING:
            assert ours == staying
            assert self.addresses == set(generation.config.listen), "left by a reload"
        if state in SERVES:
            assert self.log_level == generation.config.log_level, "left by a reload"
            assert self.keepalive == generation.config.keepalive, "left by a reload"
        else:
            assert not staying
        deadlines = [one for one in self.workers() if one.kill_at < math.inf]
        assert deadlines == [o for o in self.workers() if o.order and not o.killed_because]
        self.check_notified(state)

    def check_notified(self, state: State) -> None:
        assert self.notified.count("STOPPING") <= 1
        others = [word for word in self.notified if word != "STOPPING"]
        assert all(one != other for one, other in itertools.pairwise(others)), self.notified
        if state is State.RELOADING:
            assert others[-1] == "RELOADING"
        elif state in (State.SERVING, State.LEAVING):
            assert others[-1] == "READY"
        if "STOPPING" in self.notified:
            assert "READY" not in self.notified[self.notified.index("STOPPING") :]


ACTIONS = (
    "accept",
    "die",
    "leave",
    "wait",
    "reload",
    "reload_invalid",
    "term",
    "restart",
    "lose_store",
)


@pytest.fixture(name="enter")
def fixture_enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[World], World]:
    """A function after which the modules of the supervisor live in a world."""
    worlds: list[World] = []

    def here(name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:  # in the world of that time
            return getattr(worlds[-1], name)(*args, **named)

        return call

    system = SimpleNamespace(
        write=here("write"),
        close=lambda fd: None,
        kill=here("kill"),
        waitpid=here("waitpid"),
        waitstatus_to_exitcode=lambda status: status,
        WNOHANG=os.WNOHANG,
    )
    for module in (fleet, worker_process, supervisor, backoff, watchdog):
        monkeypatch.setattr(module, "monotonic", lambda: worlds[-1].now)
    for module in (fleet, worker_process):
        monkeypatch.setattr(module, "os", system)
    for module in (fleet, supervisor):
        monkeypatch.setattr(module.log, "disabled", True)
    monkeypatch.setattr(fleet.Fleet, "_fork", lambda self, *args: worlds[-1].fork(*args))
    monkeypatch.setattr(
        supervisor, "Signals", lambda: SimpleNamespace(fetch=here("fetch"), sender=0)
    )
    monkeypatch.setattr(supervisor, "WORKERS_MAX", 2 * WORKERS)  # for the size of the scoreboard
    monkeypatch.setattr(status_line, "queue_of", lambda socket: ())
    monkeypatch.setattr(supervisor, "conflicts", lambda *_, **__: [])
    monkeypatch.setattr("outlive.descriptors.raise_limit", lambda: None)
    monkeypatch.setattr("gc.freeze", lambda: None)

    def set_level(level: str) -> None:
        starting.log_level = level
        if worlds:
            worlds[-1].log_level = level

    starting = SimpleNamespace(log_level="")
    monkeypatch.setattr(messages, "set_level", set_level)

    def enter(world: World) -> World:
        world.log_level = starting.log_level
        worlds[:] = [world]
        return world

    return enter


def test_every_pair_is_in_the_table() -> None:
    assert set(Supervisor.TABLE) == set(Input)
    assert {len(row) for row in Supervisor.TABLE.values()} == {len(State) - 1}
    assert [state.value for state in State] == list(range(len(State)))


@pytest.mark.parametrize(("first", "delay"), [(["accept"], 0), (["accept"], 5), ([], 0)])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("last_good", [True, False])
def test_all_sequences(
    enter: Callable[[World], World], first: list[str], last_good: bool, keeps: bool, delay: float
) -> None:
    ends = set()
    for names in itertools.product(ACTIONS, repeat=LENGTH):
        world = enter(World(keeps=keeps, delay=delay, last_good=last_good))
        try:
            world.run([*first, *names, *["accept", "leave", "wait"] * 4])
        except NothingMoreError:
            pass
        except supervisor.StartError:
            assert not first
            assert world.supervisor.state is State.GONE
        except AssertionError as error:
            raise AssertionError(f"{names}: {error}") from error
        end = world.supervisor.state
        assert end in (State.SERVING, State.GONE), names
        assert end is State.GONE or world.file_is_read, names
        assert end is State.GONE or not {"term", "restart"} & set(names), names
        ends.add(end)
    assert State.GONE in ends


@pytest.mark.parametrize(("keeps", "order"), [(True, Order.LEAVE_IN_STORE), (False, Order.DRAIN)])
def test_start_that_fails_loses_no_connection(
    enter: Callable[[World], World], keeps: bool, order: Order
) -> None:
    world = enter(World(keeps=keeps))
    with pytest.raises(supervisor.StartError):
        world.run(["die", "leave"])
    assert world.orders == [order]


def test_kept_connections_are_taken_back_if_the_store_is_lost(
    enter: Callable[[World], World],
) -> None:
    world = enter(World())
    world.run(["accept", "restart", "lose_store", "leave", "accept", "leave"])
    assert world.supervisor.state is State.GONE
    assert next(world.pids) == WORKERS + 2, "no worker took the connections back"


@pytest.mark.parametrize("order", ["term", "restart"])
def test_worker_that_dies_before_it_is_told_to_stop_leaves_its_connections(
    enter: Callable[[World], World], monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """The order arrives before the supervisor knows that it is dead."""
    world = enter(World())
    told: list[Order | None] = []
    leave = Keepers.leave

    def noting(self: Keepers, dead: WorkerProcess, status: int) -> bool:
        told.append(dead.order)
        return leave(self, dead, status)

    monkeypatch.setattr(Keepers, "leave", noting)
    world.holds_connections = True  # soon, when the other worker takes none any more
    world.run(["accept", f"die_before_{order}", "leave", "accept", "leave"])
    assert told[0] is None
    assert world.supervisor.state is State.GONE
    assert next(world.pids) == WORKERS + (2 if order == "term" else 1)


def test_attempts_to_close_what_is_in_the_channel_are_limited(
    enter: Callable[[World], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = enter(World())
    monkeypatch.setattr(
        World, "holds_connections", property(lambda _: True, lambda *_: None), raising=False
    )
    world.run(["accept", "term", *["leave"] * 5, "wait", "leave"])
    assert world.supervisor.state is State.GONE
    assert next(world.pids) == WORKERS + 6


def test_reload_that_takes_too_long_is_abandoned(enter: Callable[[World], World]) -> None:
    world = enter(World())
    with pytest.raises(NothingMoreError):
        world.run(["accept", "reload", "wait"])
    assert world.supervisor.state is State.SERVING
    assert world.notified == ["READY", "RELOADING", "READY"]
    retired = [worker for worker in world.workers() if worker.order]
    assert [worker.order for worker in retired] == [Order.HAND_OVER] * WORKERS


def test_hung_worker_is_killed_and_counted_once(enter: Callable[[World], World]) -> None:
    world = enter(World(watchdog_interval=2))
    with pytest.raises(NothingMoreError):
        world.run(["accept", "hang", *["tick"] * 12])
    assert len(world.signalled) == WORKERS
    assert world.supervisor._scoreboard.events()["workers_died_hung"] == WORKERS


@pytest.mark.parametrize(
    ("order", "event"), [("reload", Event.WORKER_HUNG), ("term", Event.ANSWERS_CUT_OFF)]
)
def test_worker_late_to_exit_is_an_event_of_what_it_was_told(
    enter: Callable[[World], World], monkeypatch: pytest.MonkeyPatch, order: str, event: Event
) -> None:
    world = enter(World())
    logged: list[Any] = []
    monkeypatch.setattr(fleet.log, "log", lambda *_, extra: logged.append(extra))
    with contextlib.suppress(NothingMoreError):
        world.run(["accept", order, "accept", "wait"])
    assert [extra["fields"]["MESSAGE_ID"] for extra in logged] == [event.message_id] * WORKERS
