"""A worker process, as seen by the supervisor."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from time import monotonic

from tcpupperd.processes.scoreboard import Slot
from tcpupperd.serving.counters import ACCEPTING, HEARTBEAT, PID, STATE

#: Seconds after which a worker is considered healthy even without having had a client.
LONG = 10.0


class WorkerProcess:
    """The supervisor's record of a worker, and the means to control it."""

    def __init__(self, pid: int, slot: Slot, control: int, generation: int) -> None:
        self.pid = pid
        self.slot = slot
        self.generation = generation
        self.started = monotonic()
        slot.numbers[PID] = pid
        self.kill_at = math.inf
        self.killed = False
        self._control: int | None = control

    @property
    def accepting(self) -> bool:
        """Whether it is accepting connections yet."""
        return self.slot.numbers[STATE] == ACCEPTING

    @property
    def served(self) -> bool:
        """Whether it has ever had a connection, or has lived long enough to have had one."""
        return self.slot.connections > 0 or monotonic() - self.started > LONG

    @property
    def retired(self) -> bool:
        """Whether it has been told to exit."""
        return self._control is None

    def silent_for(self, now: float) -> float:
        """Seconds since its last heartbeat."""
        return now - self.slot.numbers[HEARTBEAT] / 1_000_000

    def retire(self, order: bytes, timeout: float) -> None:
        """Send it an order to exit, and set the time after which it is killed."""
        if self._control is None:
            return
        self.kill_at = monotonic() + timeout
        with contextlib.suppress(BrokenPipeError):  # it has just died
            os.write(self._control, order)
        self.let_go()

    def let_go(self) -> None:
        """Close the supervisor's end of its control pipe."""
        if self._control is not None:
            os.close(self._control)
            self._control = None

    def kill(self) -> None:
        """Kill it. There is no gentler way, because workers handle no signals."""
        self.kill_at = math.inf
        self.killed = True
        os.kill(self.pid, signal.SIGKILL)
