"""Timers: everything that an event loop does at a certain time, sans I/O.

There are only a few, so a search for the earliest is fast enough. The deadlines of connections, of
which there are many, share one timer: see `deadlines`.
"""

from __future__ import annotations

import math
from collections.abc import Callable


class Timers:
    """The timers that are set; `next` is the time of the earliest one, or infinity."""

    def __init__(self) -> None:
        self._set: list[Timer] = []
        self.next = math.inf

    def update(self, timer: Timer, when: float) -> None:
        """Set a timer for another time."""
        if timer.pending:
            self._set.remove(timer)
        timer.when = when
        if timer.pending:
            self._set.append(timer)
        self.next = min((timer.when for timer in self._set), default=math.inf)

    def run_due(self, now: float) -> None:
        """Call everything that is due, in order of time. Whatever this sets for `now` is due the
        next time; otherwise, it could go on forever."""
        due = [timer for timer in self._set if timer.when <= now]
        for timer in sorted(due, key=lambda timer: timer.when):
            if timer.when <= now:  # otherwise another one has just changed it
                timer.cancel()
                timer.call()


class Timer:
    """Calls something once, at the time `when`, which can be changed. Infinity means never."""

    __slots__ = ("_timers", "call", "when")

    def __init__(self, timers: Timers, call: Callable[[], object]) -> None:
        self._timers = timers
        self.call = call
        self.when = math.inf

    @property
    def pending(self) -> bool:
        """Whether the call is still to come."""
        return self.when < math.inf

    def set(self, when: float) -> None:
        """Call at this time instead."""
        if when != self.when:
            self._timers.update(self, when)

    def cancel(self) -> None:
        """Do not call, unless it is set again."""
        self.set(math.inf)
