"""The deadlines of many connections, which are checked only when one may have passed."""

from __future__ import annotations

import heapq
import math


class Deadlines:
    """Holds descriptors until the first tick (a quarter of a second) after their deadline.

    The descriptors of one tick share a bucket, so their number does not matter: the owner wakes up
    at most once per tick. Each costs one element of a set. In a heap, it would cost a tuple and a
    number, and a closed connection could not be removed early. An empty bucket is kept until its
    tick; otherwise, each short connection would recreate it and add its tick to the heap again.
    """

    TICK = 0.25

    def __init__(self) -> None:
        self._buckets: dict[int, set[int]] = {}
        self._ticks: list[int] = []  # a heap of the buckets' ticks

    def add(self, fd: int, when: float) -> set[int]:
        """Hold `fd` until `when` (seconds); return the bucket from which to discard it."""
        tick = math.ceil(when / self.TICK)
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = set()
            heapq.heappush(self._ticks, tick)
        bucket.add(fd)
        return bucket

    def next_tick(self) -> float:
        """The time at which `pop_due` will next return something; infinity if nothing is held."""
        while self._ticks and not self._buckets[self._ticks[0]]:
            del self._buckets[heapq.heappop(self._ticks)]
        return self._ticks[0] * self.TICK if self._ticks else math.inf

    def pop_due(self, now: float) -> set[int]:
        """Remove and return the descriptors of one tick that has passed, or an empty set."""
        if self.next_tick() > now:
            return set()
        # A copy, because the owner may discard from the bucket while it iterates.
        return set(self._buckets.pop(heapq.heappop(self._ticks)))
