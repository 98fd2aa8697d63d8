"""Deadlines of many connections, checked only when one can have come."""

from __future__ import annotations

import heapq
import math


class Deadlines:
    """Holds descriptors until the first tick (a quarter of a second) after their time.

    Those of one tick share a bucket, so however many there are, the holder is woken no more than
    once a tick. Each costs a place in a set; in a heap it would cost a tuple and a number, and a
    closed connection could not leave before its time.
    """

    TICK = 0.25

    def __init__(self) -> None:
        self._buckets: dict[int, set[int]] = {}
        self._ticks: list[int] = []  # a heap of the buckets' ticks

    def add(self, fd: int, when: float) -> int:
        """Hold `fd` until `when` (seconds); returns the tick to `discard` it by."""
        tick = math.ceil(when / self.TICK)
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = set()
            heapq.heappush(self._ticks, tick)
        bucket.add(fd)
        return tick

    def discard(self, fd: int, tick: int) -> None:
        """Let go of `fd`; it may be gone already."""
        # An empty bucket stays until its turn: one made anew for each connection that comes and
        # goes would put its tick into the heap each time.
        if tick in self._buckets:
            self._buckets[tick].discard(fd)

    def next(self) -> float:
        """When `due` will have something next; infinity if nothing is held."""
        while self._ticks and not self._buckets[self._ticks[0]]:
            del self._buckets[heapq.heappop(self._ticks)]
        return self._ticks[0] * self.TICK if self._ticks else math.inf

    def due(self, now: float) -> set[int]:
        """Take out the descriptors of one tick that has passed; an empty set if there is none."""
        if self.next() > now:
            return set()
        return self._buckets.pop(heapq.heappop(self._ticks))
