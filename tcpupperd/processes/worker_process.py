"""A worker process, as the supervisor sees it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
from time import monotonic

from outlive.channel import Channel
from tcpupperd.processes.generation import Generation
from tcpupperd.processes.orders import CHANNEL, NEW_KEEPER, Order, Verdict
from tcpupperd.processes.scoreboard import Slot
from tcpupperd.serving.counters import ACCEPTING, HEARTBEAT, PID, STATE

#: Seconds after which a worker is considered healthy even without having had a client.
HEALTHY_AFTER = 10.0


class WorkerProcess:
    """A worker, as the supervisor sees it."""

    def __init__(self, pid: int, slot: Slot, control: int, generation: Generation) -> None:
        self.pid = pid
        self.keeper = 0  # the process ID of its keeper, once it is known: see Keepers.bind
        self.slot = slot
        self.generation = generation
        self.started = monotonic()
        self.order: Order | None = None  # None as long as it should serve
        self.kill_at = math.inf
        self.killed_because = ""  # empty unless the supervisor has killed it
        self._control = control
        slot.numbers[PID] = pid

    @property
    def is_accepting(self) -> bool:
        """Whether it is accepting connections yet."""
        return self.slot.numbers[STATE] == ACCEPTING

    @property
    def is_healthy(self) -> bool:
        """Whether it ever had a connection, or lived long enough to have had one."""
        return self.slot.connections > 0 or monotonic() - self.started > HEALTHY_AFTER

    @property
    def was_cut_off(self) -> bool:
        """Whether it was killed because it could not close its connections in time."""
        return self.order is Order.DRAIN and bool(self.killed_because)

    def since_heartbeat(self, now: float) -> float:
        """Seconds since its last heartbeat."""
        return now - self.slot.numbers[HEARTBEAT] / 1_000_000

    def retire(self, order: Order, timeout: float) -> None:
        """Order it to exit, and set a deadline for that, after which it is killed. Only the first
        order counts."""
        if self.order:
            return
        self.order = order
        if not self.killed_because:
            self.kill_at = monotonic() + timeout
        self._send(order.value)

    def use_channel(self, channel: Channel) -> None:
        """Have it use another channel, unless it has been ordered to exit."""
        if self.order or self._control < 0:
            return
        with (
            contextlib.suppress(OSError),  # it has just died
            socket.socket(fileno=os.dup(self._control)) as control,
        ):
            control.setblocking(False)
            ends = [channel.send_end.fileno(), channel.receive_end.fileno()]
            socket.send_fds(control, [CHANNEL], ends)

    def replace_keeper(self) -> None:
        """Have it start another keeper."""
        self.keeper = 0
        self._send(NEW_KEEPER)

    def judge(self, verdict: Verdict) -> None:
        """Tell its keeper what to do, because it is dead."""
        self._send(verdict.value)

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has just died
            os.write(self._control, message)

    def close(self) -> None:
        """Close the supervisor's end of its control socket: to the worker, this is an order."""
        control, self._control = self._control, -1
        if control >= 0:
            os.close(control)

    def kill(self, because: str) -> None:
        """Kill it. There is no gentler way, because workers handle no signals."""
        self.kill_at = math.inf
        self.killed_because = because
        os.kill(self.pid, signal.SIGKILL)
