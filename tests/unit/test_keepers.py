"""What the supervisor decides about the connections of a dead worker."""

import contextlib
import itertools
import math
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tcpupperd.config import Config
from tcpupperd.host import memory_events
from tcpupperd.host.in_flight import InFlight
from tcpupperd.processes import connection_format, keepers
from tcpupperd.processes.connection_format import Connection
from tcpupperd.processes.generation import Generation
from tcpupperd.processes.keeper import Estate, Keeper
from tcpupperd.processes.keepers import DEATHS, KEEPER_TIME, WAIT_MAX, Keepers, verdict_on
from tcpupperd.processes.orders import Order, Verdict
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.processes.signals import FAULTS
from tcpupperd.processes.worker_process import WorkerProcess
from tcpupperd.serving.counters import KEEPER, OPEN, WORKER_DIED
from tcpupperd.serving.ledger import Ledger
from unit.channels import tcp_pairs
from waiting import until

ROOT = Path(__file__).parents[2]


#: For workers that have died long ago.
NUMBERS = itertools.count(2**22)


class Dead:
    """A worker that has died, and what its keeper reads."""

    def __init__(self, scoreboard: Scoreboard) -> None:
        ours, self.control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        generation = Generation(Config(), "")
        self.process = WorkerProcess(next(NUMBERS), scoreboard.claim(), ours.detach(), generation)
        self.process.slot.numbers[OPEN] = 3

    def read(self) -> bytes:
        try:
            return self.control.recv(10)
        except BlockingIOError:
            return b"nothing yet"


Die = Callable[[], Dead]


@pytest.fixture
def scoreboard() -> Scoreboard:
    return Scoreboard(100)


@pytest.fixture
def die(scoreboard: Scoreboard) -> Iterator[Die]:
    """Makes a dead worker."""
    died: list[Dead] = []

    def make() -> Dead:
        died.append(Dead(scoreboard))
        return died[-1]

    yield make
    for dead in died:
        dead.control.close()
        dead.process.close()


@pytest.fixture
def child() -> Iterator[int]:
    """The process ID of a child of this process, which may be a keeper."""
    pid = os.fork()
    if not pid:
        signal.pause()
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def claims(them: Keepers, dead: Dead, keeper: int, *others: Dead) -> None:
    """A worker says that a process is its keeper; `others` have said what they had to say."""
    dead.process.slot.numbers[KEEPER] = keeper
    them.bind({one.process.pid: one.process for one in (dead, *others)})


KILLED, CRASHED = -signal.SIGKILL, -signal.SIGSEGV


@pytest.mark.parametrize(
    ("status", "order", "killed", "verdict"),
    [
        (KILLED, None, "", Verdict.HAND_OVER),
        (KILLED, Order.HAND_OVER, "", Verdict.HAND_OVER),
        (CRASHED, None, "", Verdict.BLAME),
        (70, None, "", Verdict.BLAME),
        (KILLED, None, "it hung", Verdict.BLAME),
        (KILLED, Order.DRAIN, "it took too long", Verdict.NOTHING),
        (KILLED, Order.DRAIN, "", Verdict.HAND_OVER),
        (CRASHED, Order.DRAIN, "", Verdict.BLAME),
        (0, Order.DRAIN, "", Verdict.NOTHING),
        (0, Order.HAND_OVER, "", Verdict.NOTHING),
    ],
)
def test_verdict(
    die: Die, status: int, order: Order | None, killed: str, verdict: Verdict
) -> None:
    dead = die().process
    dead.order, dead.killed_because = order, killed
    assert verdict_on(dead, status, for_memory=False) is verdict


def test_verdict_if_memory_has_run_out(die: Die) -> None:
    dead = die().process
    assert verdict_on(dead, KILLED, for_memory=True) is Verdict.SPARE_MEMORY
    assert verdict_on(dead, CRASHED, for_memory=True) is Verdict.BLAME


@pytest.mark.parametrize("claim", [0, 1, 2**40, 2**64 - 1])
def test_process_that_is_not_a_child_is_no_keeper(
    scoreboard: Scoreboard, die: Die, claim: int
) -> None:
    """Only the worker says which process its keeper is."""
    dead, them = die(), Keepers(scoreboard)
    claims(them, dead, claim)
    assert not them.leave(dead.process, -signal.SIGKILL)
    assert scoreboard.daemon[WORKER_DIED] == 3
    assert not them


def test_process_that_is_something_else_is_no_keeper(
    scoreboard: Scoreboard, die: Die, child: int
) -> None:
    honest, other, them = die(), die(), Keepers(scoreboard)
    claims(them, honest, child)
    claims(them, other, child, honest)
    assert (honest.process.keeper, other.process.keeper) == (child, 0)
    assert them.leave(honest.process, -signal.SIGKILL)
    claims(them, other, child)  # the keeper of a dead worker
    assert not them.leave(other.process, -signal.SIGKILL)
    worker = die()
    worker.process.pid = child
    impostor = die()
    claims(them, impostor, child, worker)
    assert impostor.process.keeper == 0
    assert them.reaped(child)


def test_worker_is_believed_once(scoreboard: Scoreboard, die: Die, child: int) -> None:
    worker, them = die(), Keepers(scoreboard)
    claims(them, worker, child)
    claims(them, worker, os.getpid())
    assert worker.process.keeper == child
    worker.process.replace_keeper()  # because it has died
    claims(them, worker, child)
    assert worker.process.keeper == child


def test_c_module_knows_the_same_signals() -> None:
    text = (ROOT / "tcpupperd/serving/_fast_path.c").read_text()
    (listed,) = re.findall(r"static const int numbers\[\] = \{(.*?)\}", text)
    assert set(listed.split(", ")) == {number.name for number in FAULTS}


@contextlib.contextmanager
def keeper_of(scoreboard: Scoreboard, control: socket.socket) -> Iterator[Keeper]:
    """A keeper that has not been started."""
    ledger = Ledger(1024)
    numbers = scoreboard.claim().numbers
    keeper = Keeper(Estate(numbers, control, {}, {}, ledger, InFlight(), lambda: 1))
    yield keeper
    os.close(keeper._pidfd)
    os.close(ledger._file)


def test_number_of_a_descriptor_may_be_used_again(scoreboard: Scoreboard) -> None:
    """The channel, which the keeper has found open, is closed if it is replaced."""
    ((client, newcomer),) = tcp_pairs(1)
    with client, newcomer, socket.socket() as before, keeper_of(scoreboard, before) as keeper:
        number = before.fileno()
        os.dup2(newcomer.fileno(), number)
        _, found = keeper._sorted()
        assert number in [one.detach() for one in found]


def test_damaged_ledger_costs_only_what_it_is_wrong_about(scoreboard: Scoreboard) -> None:
    receiving, sending = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with receiving, sending, keeper_of(scoreboard, sending) as keeper:
        (one, damaged), (other, whole) = tcp_pairs(2)
        ports = {damaged: 2**16, whole: 2**16 - 1}
        given = [Connection(end, ("192.0.2.1", port)) for end, port in ports.items()]
        keeper._numbers[OPEN] = len(given)
        keeper._hand_over(given, 1)
        assert keeper._numbers[OPEN] == 1  # lost
        with one, other, pytest.raises(ConnectionResetError):
            one.recv(1)
        ((found, address, _),) = connection_format.receive(receiving, 1)
        found.close()
        assert address == ("192.0.2.1", 2**16 - 1)


def test_what_is_not_handed_over_is_lost(scoreboard: Scoreboard, die: Die, child: int) -> None:
    dead, them = die(), Keepers(scoreboard)
    claims(them, dead, child)
    assert them.leave(dead.process, -signal.SIGKILL)
    assert dead.read() == Verdict.HAND_OVER.value
    assert scoreboard.daemon[WORKER_DIED] == 0
    dead.process.slot.numbers[OPEN] = 2  # it has handed one over
    assert not them.reaped(child + 1)
    assert them.reaped(child)
    assert scoreboard.daemon[WORKER_DIED] == 2
    assert not them
    assert them.next_wake == math.inf


def test_keeper_that_takes_too_long_is_killed(
    scoreboard: Scoreboard, die: Die, child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(keepers, "monotonic", lambda: now)
    dead, them = die(), Keepers(scoreboard)
    claims(them, dead, child)
    assert them.leave(dead.process, KILLED)
    assert them.next_wake == now + KEEPER_TIME
    os.kill(child, signal.SIGSTOP)
    now += KEEPER_TIME - 0.1
    them.act()
    assert not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    now = them.next_wake
    them.act()
    ended = until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    assert ended.si_status == signal.SIGKILL
    assert them.reaped(child)
    assert scoreboard.daemon[WORKER_DIED] == 3


def test_deaths_in_a_row_slow_the_keepers_down(
    scoreboard: Scoreboard, die: Die, child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(keepers, "monotonic", lambda: now)
    them = Keepers(scoreboard)
    waits = []
    for _ in range(2 * DEATHS + 10):
        dead = die()
        claims(them, dead, child)
        began = now
        them.leave(dead.process, -signal.SIGKILL)
        while dead.read() == b"nothing yet":
            now = them.next_wake
            them.act()
        waits.append(now - began)
        assert them.reaped(child)
    assert waits[:DEATHS] == [0.0] * DEATHS
    assert 0 < max(waits) <= WAIT_MAX


def test_kills_for_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_events, "ROOT", str(tmp_path))
    assert memory_events.oom_kills() == 0
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    ours = [line.partition("::")[2] for line in groups if "::" in line]
    if not ours:
        pytest.skip("this host has no control groups of version 2")
    folder = Path(f"{tmp_path}{ours[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert memory_events.oom_kills() == 2
