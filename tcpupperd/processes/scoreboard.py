"""Counters and heartbeats that all processes of the daemon share.

One anonymous shared mapping holds a slot of 64-bit numbers for each worker. A worker writes its
own slot only and the supervisor reads all of them, so there is nothing to lock: an aligned
64-bit number is written at once.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

from tcpupperd.serving.counters import FIELDS, OPEN

_SLOT_SIZE = 256  # bytes: whole cache lines, so that workers do not slow each other


class Scoreboard:
    """The slots of up to `size` workers, and the totals of those that are gone."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, size * _SLOT_SIZE))
        self._free = list(reversed(range(size)))
        self._live: list[Slot] = []
        self._gone = [0] * len(FIELDS)

    def claim(self) -> Slot:
        """A slot for a new worker; IndexError if all are taken."""
        index = self._free.pop()
        start = index * _SLOT_SIZE
        numbers = self._memory[start : start + len(FIELDS) * 8].cast("Q")
        slot = Slot(index, numbers)
        self._live.append(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """Count a worker that is gone among the totals, and free its slot."""
        for field in range(len(FIELDS)):
            self._gone[field] += slot.numbers[field]
            slot.numbers[field] = 0
        self._gone[OPEN] = 0
        self._live.remove(slot)
        self._free.append(slot.position)

    def totals(self) -> dict[str, int]:
        """The connections open now, and all that was counted since the daemon started."""
        return {
            name: self._gone[field] + sum(slot.numbers[field] for slot in self._live)
            for field, name in enumerate(FIELDS)
            if field >= OPEN
        }


class Slot(NamedTuple):
    """A worker's place: `numbers` are its FIELDS."""

    position: int
    numbers: memoryview
