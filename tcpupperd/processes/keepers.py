"""The keepers of dead workers, from the supervisor's point of view."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections import deque
from collections.abc import Mapping
from time import monotonic

from tcpupperd.events import Event
from tcpupperd.host.memory_events import oom_kills
from tcpupperd.processes.orders import Verdict
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.processes.signals import FAULTS
from tcpupperd.processes.worker_process import WorkerProcess
from tcpupperd.serving.counters import EXITING, KEEPER, OPEN, STATE, WORKER_DIED
from tcpupperd.words import counted

log = logging.getLogger(__name__)

#: Seconds that a keeper has to hand over the connections of its worker.
KEEPER_TIME = 30.0

#: If more than so many workers died within so many seconds, each further death makes the keepers
#: wait longer. Otherwise, what is handed over might make the kernel run out of memory again.
DEATHS, PERIOD = 30, 10.0
WAIT_STEP, WAIT_MAX = 0.2, 5.0


class Keepers:
    """Tells the keepers of dead workers what to do, and waits for them."""

    def __init__(self, scoreboard: Scoreboard) -> None:
        self._scoreboard = scoreboard
        self._dead: dict[int, WorkerProcess] = {}  # by their keepers
        self._verdicts: deque[tuple[float, WorkerProcess, Verdict]] = deque()  # to be given
        self._deaths: deque[float] = deque()
        self._oom_kills = oom_kills()  # so far

    def __len__(self) -> int:
        return len(self._dead)

    @property
    def next_wake(self) -> float:
        """The time at which something is due."""
        due = self._verdicts[0][0] if self._verdicts else math.inf
        return min(due, *(dead.kill_at for dead in self._dead.values()), math.inf)

    def bind(self, workers: Mapping[int, WorkerProcess]) -> None:
        """Note which process is the keeper of each worker. The worker says so, and is believed
        once, as a rule before it has served a client, about a child that is nothing else."""
        known = {*workers, *self._dead, *(worker.keeper for worker in workers.values())}
        for worker in workers.values():
            claimed = worker.slot.numbers[KEEPER]
            if not worker.keeper and claimed not in known and is_child(claimed):
                worker.keeper = claimed
                known.add(claimed)

    def leave(self, dead: WorkerProcess, status: int) -> bool:
        """Leave the connections of a dead worker to its keeper; return whether it has one that
        hands them over. `status` is a result of `os.waitstatus_to_exitcode`."""
        now = monotonic()
        dead.slot.numbers[STATE] = EXITING
        if not dead.keeper:
            self._bury(dead)
            return False
        verdict = verdict_on(dead, status, for_memory=self._was_for_memory())
        wait = 0.0 if verdict is Verdict.NOTHING else self._wait(now)
        dead.kill_at = now + wait + KEEPER_TIME
        self._dead[dead.keeper] = dead
        self._verdicts.append((now + wait, dead, verdict))
        self.act()
        return verdict is not Verdict.NOTHING

    def _was_for_memory(self) -> bool:
        """Whether the kernel has killed another process for lack of memory."""
        before, self._oom_kills = self._oom_kills, oom_kills()
        return self._oom_kills > before

    def _wait(self, now: float) -> float:
        """Seconds until a keeper may begin."""
        self._deaths.append(now)
        while self._deaths[0] < now - PERIOD:
            self._deaths.popleft()
        return min(WAIT_MAX, max(0, len(self._deaths) - DEATHS) * WAIT_STEP)

    def act(self) -> None:
        """Do what is due."""
        now = monotonic()
        while self._verdicts and self._verdicts[0][0] <= now:
            _, dead, verdict = self._verdicts.popleft()
            dead.judge(verdict)
        for keeper, dead in self._dead.items():
            if dead.kill_at <= now:
                dead.kill_at = math.inf
                os.kill(keeper, signal.SIGKILL)

    def reaped(self, pid: int) -> bool:
        """Whether this process, which has exited, was the keeper of a dead worker."""
        dead = self._dead.pop(pid, None)
        if not dead:
            return False
        lost = self._bury(dead)
        if lost and not dead.was_cut_off:
            extra = Event.WORKER_DIED.fields(TCPUPPERD_WORKER=dead.pid)
            log.warning("%s of worker %d lost", counted(lost, "connection"), dead.pid, extra=extra)
        return True

    def close(self) -> None:
        """Close this process's ends of all control sockets."""
        for dead in self._dead.values():
            dead.close()

    def _bury(self, dead: WorkerProcess) -> int:
        """Count the connections of a dead worker that nobody has handed over."""
        lost: int = dead.slot.numbers[OPEN]
        dead.close()
        self._scoreboard.release(dead.slot)
        self._scoreboard.count(WORKER_DIED, lost)
        return lost


def is_child(pid: int) -> bool:
    """Whether this is a child that has not been reaped."""
    if not 0 < pid < 2**31:
        return False
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def verdict_on(dead: WorkerProcess, status: int, *, for_memory: bool) -> Verdict:
    """What the keeper of a dead worker has to do; `for_memory` if memory ran out meanwhile."""
    if dead.was_cut_off or status == 0:
        return Verdict.NOTHING
    # SIGKILL from outside is not the fault of what the worker was doing.
    if dead.killed_because or status > 0 or -status in FAULTS:
        return Verdict.BLAME
    return Verdict.SPARE_MEMORY if for_memory else Verdict.HAND_OVER
