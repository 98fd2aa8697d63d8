"""The deadlines of many connections, which are checked only when one may have passed."""

from __future__ import annotations

import heapq
import math
from itertools import islice


class Deadlines:
    """Holds descriptors until the first tick after their deadline.

    The descriptors of one tick share a bucket, so their number does not matter: the owner wakes up
    at most once per tick, unless there are more than it should handle in one loop iteration. Each
    costs one element of a set. In a heap, it would cost a tuple and a number, and a closed
    connection could not be removed early. An empty bucket is kept until its tick; otherwise, each
    short connection would recreate it and add its tick to the heap again.
    """

    #: Seconds between two ticks, for timeouts and for what clients measure: powers of two, so that
    #: the times of ticks are exact.
    TICK = 2**-2
    FINE_TICK = 2**-7

    #: The number of descriptors that `pop_due` returns at most.
    AT_MOST = 16

    def __init__(self) -> None:
        self._buckets: dict[float, set[int]] = {}
        self._ticks: list[float] = []  # a heap of the times of the buckets

    def add(self, fd: int, when: float, tick: float = TICK) -> set[int]:
        """Hold `fd` until `when` (seconds); return the bucket from which to discard it."""
        when = math.ceil(when / tick) * tick
        bucket = self._buckets.get(when)
        if bucket is None:
            bucket = self._buckets[when] = set()
            heapq.heappush(self._ticks, when)
        bucket.add(fd)
        return bucket

    def next_tick(self) -> float:
        """The time at which `pop_due` will next return something; infinity if nothing is held."""
        while self._ticks and not self._buckets[self._ticks[0]]:
            del self._buckets[heapq.heappop(self._ticks)]
        return self._ticks[0] if self._ticks else math.inf

    def pop_due(self, now: float) -> set[int]:
        """Remove and return descriptors of one tick that has passed, or an empty set."""
        if self.next_tick() > now:
            return set()
        bucket = self._buckets[self._ticks[0]]
        # A copy, because the owner may discard from the bucket while it iterates.
        due = set(islice(bucket, self.AT_MOST))
        bucket -= due
        return due
