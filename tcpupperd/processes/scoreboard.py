"""Counters and heartbeats that all processes of the daemon share.

One anonymous shared mapping has a slot of 64-bit numbers for each worker. A worker writes only its
own slot, and all processes read all slots. No lock is needed, because writing an aligned 64-bit
number is atomic.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

from tcpupperd.serving.counters import FIELDS, HEARTBEAT, LEAVING, OPEN, STATE

_SLOT_SIZE = 256  # bytes: whole cache lines, so that workers do not slow each other
_ROW = _SLOT_SIZE // 8  # numbers


class Scoreboard:
    """The slots of up to `size` workers, and the totals of workers that have exited."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, size * _SLOT_SIZE + 8))
        self._numbers = self._memory.cast("Q")  # the last one: how many slots were ever used
        self._free = list(reversed(range(size)))
        self._live: list[Slot] = []
        self._gone = [0] * len(FIELDS)

    def claim(self) -> Slot:
        """Return a slot for a new worker. Raises IndexError if all are taken."""
        index = self._free.pop()
        self._numbers[-1] = max(self._numbers[-1], index + 1)
        start = index * _SLOT_SIZE
        numbers = self._memory[start : start + len(FIELDS) * 8].cast("Q")
        slot = Slot(index, numbers)
        self._live.append(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """Add the numbers of a worker that has exited to the totals, and free its slot."""
        for field in range(len(FIELDS)):
            self._gone[field] += slot.numbers[field]
            slot.numbers[field] = 0
        self._gone[OPEN] = 0
        self._live.remove(slot)
        self._free.append(slot.position)

    def totals(self) -> dict[str, int]:
        """The open connections, and all counters since the daemon started."""
        return {
            name: self._gone[field] + sum(slot.numbers[field] for slot in self._live)
            for field, name in enumerate(FIELDS)
            if field >= OPEN
        }

    # Visible to every process, even for workers that were started later

    def loads(self) -> list[int]:
        """The number of connections of each worker that is not leaving, including those that have
        only just been started. (The supervisor writes the first heartbeat.)"""
        used = self._used()  # once: the supervisor may start another worker meanwhile
        columns = (self._column(field, used) for field in (HEARTBEAT, STATE, OPEN))
        rows = zip(*columns, strict=True)
        return [count for beat, state, count in rows if beat and state != LEAVING]

    def open(self) -> int:
        """The number of connections of all workers."""
        return sum(self._column(OPEN, self._used()))

    def _used(self) -> int:
        """How many slots were ever in use."""
        return self._numbers[-1]

    def _column(self, field: int, used: int) -> list[int]:
        return self._numbers[field : used * _ROW : _ROW].tolist()


class Slot(NamedTuple):
    """A worker's place: `numbers` are its FIELDS."""

    position: int
    numbers: memoryview
