"""The watchdog: finds workers that are hung, as the service manager's finds a hung daemon."""

from __future__ import annotations

import math
from collections.abc import Iterable
from time import monotonic

from tcpupperd.processes.worker_process import WorkerProcess


class Watchdog:
    """Checks heartbeats several times in each `interval`, which is 0 if there is no watchdog.

    If the supervisor itself woke up late, for example because the whole service was suspended, the
    workers are given a full interval again: time during which nothing ran does not count.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._awake_since = 0.0  # when the supervisor last woke up late
        self.check_at = 0.0 if interval else math.inf  # when the next check is due

    def hung(self, workers: Iterable[WorkerProcess]) -> list[WorkerProcess]:
        """Check: return the workers whose last heartbeat was too long ago."""
        now, interval = monotonic(), self._interval
        if self.check_at and now - self.check_at > interval / 4:
            self._awake_since = now
        # sd_watchdog_enabled(3) recommends half the interval, but a wake-up is always a bit late.
        self.check_at = now + interval / 3
        # Measured at the time of the check, because the supervisor, too, may be suspended in
        # between.
        awake_for = now - self._awake_since
        return [one for one in workers if min(one.since_heartbeat(now), awake_for) > interval]
