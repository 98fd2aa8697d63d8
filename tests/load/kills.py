"""Killing random processes of a daemon under clients that check every byte.

One process at a time: what a worker leaves is lost if the process that keeps it is killed in the
same moment.
"""

import random
import signal
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from load.clients import Clients, Report
from waiting import until

#: How they are killed: from outside, by the kernel, and by the program itself.
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)

#: The header of a load balancer, and a greeting.
HEADER = "PROXY TCP4 192.0.2.7 192.0.2.1 56324 443"
GREETING = "220 ready"


class Processes(NamedTuple):
    """The processes of a daemon, without the first."""

    workers: frozenset[int]
    keepers: Mapping[int, int]  # with their workers; 0 or -1 if that is dead

    def are_complete(self, count: int) -> bool:
        """Whether there are this many workers, and each has a keeper, and no keeper is left."""
        return len(self.workers) == count and sorted(self.workers) == sorted(self.keepers.values())


class Kills:
    """Kills random processes, and sees what the clients make of it."""

    def __init__(
        self,
        loads: Collection[Clients],
        processes: Callable[[], Processes],
        kill: Callable[[int, int], None],
        order: random.Random,
        workers: int = 2,
    ) -> None:
        """`kill` sends a process a signal and waits until it is dead, unless the signal is
        blocked."""
        self._loads = loads
        self._processes = processes
        self._kill = kill
        self._random = order
        self._workers = workers
        self.done: Counter[str] = Counter()  # by signals and kinds of processes
        self.gaps: list[float] = []  # seconds that a client waited

    def kill(self) -> None:
        """Kill one process, whatever the daemon is doing; none if it has none at the moment."""
        kind = self._random.choice(("workers", "workers", "keepers"))
        number = self._random.choice(SIGNALS)
        if victims := sorted(getattr(self._processes(), kind)):
            self._kill(self._random.choice(victims), number)
            self.done[f"{number.name} {kind}"] += 1

    def settle(self) -> None:
        """Wait until the daemon is complete again, and every client was answered."""
        try:
            until(lambda: self._processes().are_complete(self._workers))
        except AssertionError as error:
            error.add_note(f"{self._processes()} after {dict(self.done)}")
            raise
        for load in self._loads:
            self.gaps.append(load.mark().silence)
        until(lambda: not sum(self._noted(load).waiting for load in self._loads))
        faults = self.faults()
        assert faults == {}, f"{faults} after {dict(self.done)}"

    def faults(self) -> dict[str, int]:
        """All that the clients have to complain of."""
        found: Counter[str] = Counter()
        for load in self._loads:
            found.update(self._noted(load).faults)
        return dict(found)

    def _noted(self, load: Clients) -> Report:
        report = load.report()
        self.gaps.append(report.silence)
        return report
