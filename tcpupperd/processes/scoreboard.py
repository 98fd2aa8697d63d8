"""Counters and heartbeats that all processes of the daemon share.

There is a row of 64-bit numbers for the daemon, and one, a slot, for each worker. The supervisor
writes the first row and prepares slots, a worker writes only its own slot, and all processes read
all of it. No lock is needed, because writing an aligned 64-bit number is atomic, and because
counters never move: a slot keeps its counters after its worker has exited, and the next worker
continues from there, so no process ever sees a total that is too low or counted twice.

The content of the slots is not trusted: an intruder in a worker can write anything into all of
them. The row of the daemon is in other memory, which workers can only read.
"""

from __future__ import annotations

import errno
import logging
import math
import mmap
from time import time
from typing import NamedTuple

from outlive import memfd
from outlive.remedies import remedy
from tcpupperd.serving.counters import (
    ACCEPTED,
    ACCEPTED_FROM,
    BEGAN,
    DAEMON,
    EARLIER_LINES,
    EXITING,
    EXPECTED,
    FILE_NUMBER,
    FILE_TIME,
    GENERATION,
    HANDED_OVER_IN,
    HEARTBEAT,
    LAST_RELOAD,
    LAST_RELOAD_FAILED,
    LINES,
    LISTENERS,
    LOADED,
    MOST_TOGETHER,
    NUMBERS,
    OPEN,
    PEAK,
    PID,
    RELOADS_FAILURE,
    RELOADS_SUCCESS,
    SLOTS,
    STARTED,
    STATE,
    WORKER,
    WORKERS_DIED_EXIT,
    WORKERS_DIED_KILL_TIMEOUT,
    WORKERS_STARTED,
    microseconds,
)

log = logging.getLogger(__name__)

_ROW_SIZE = 512  # bytes: whole cache lines, so that workers do not slow each other
_ROW = _ROW_SIZE // 8  # numbers

#: The largest number of connections that is accepted from a worker: the highest possible
#: fs.nr_open.
BELIEVED = 2**31


class Scoreboard:
    """The numbers of the daemon, and of up to `size` workers at a time."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, size * _ROW_SIZE))
        self._slots = self._memory.cast("Q")
        self._ours, self._readable = _published(_ROW_SIZE)
        self._daemon = memoryview(self._ours).cast("Q")
        self.daemon = memoryview(self._readable).cast("Q")  # the numbers of DAEMON, to read
        self._daemon[BEGAN] = time_of_day()
        self._free = list(reversed(range(size)))

    # For the supervisor only

    def claim(self, generation: int = 0) -> Slot:
        """Return a slot for a worker that is about to be forked. Raises OSError if all are in
        use."""
        if not self._free:
            raise OSError(errno.EAGAIN, "all slots of the scoreboard are in use")
        row = self._free.pop()
        if self._ours is not self._readable:
            memfd.withhold(self._ours)
        start = row * _ROW_SIZE
        numbers = self._memory[start : start + NUMBERS * 8].cast("Q")
        numbers[STARTED] = numbers[HEARTBEAT] = microseconds()
        numbers[GENERATION] = generation
        numbers[EARLIER_LINES] = numbers[LINES]
        self.raise_to(SLOTS, row + 1)
        self.count(WORKERS_STARTED)
        return Slot(row, numbers, numbers[ACCEPTED] + numbers[HANDED_OVER_IN])

    def release(self, slot: Slot) -> None:
        """Free the slot of a worker that has exited; its counters stay in the totals."""
        self.raise_to(PEAK, min(slot.numbers[MOST_TOGETHER], BELIEVED))
        for field in range(OPEN + 1):
            slot.numbers[field] = 0
        self._free.append(slot.row)

    def count(self, field: int, number: int = 1) -> None:
        """Add to a number of the daemon, but no more than the number of descriptors that a process
        can have, because what is added may come from a worker."""
        self._daemon[field] += min(number, BELIEVED)

    def put(self, field: int, number: int) -> None:
        """Set a number of the daemon."""
        self._daemon[field] = number

    def raise_to(self, field: int, number: int) -> None:
        """Set a number of the daemon if it is lower."""
        self._daemon[field] = max(self._daemon[field], number)

    def loaded(self, file: tuple[int, int]) -> None:
        """Record that a configuration is now in use, with the identity of its file."""
        self._daemon[LOADED] = time_of_day()
        self._daemon[FILE_NUMBER], self._daemon[FILE_TIME] = file

    def reload_ended(self, *, failed: bool) -> None:
        """Count a reload."""
        self.count(RELOADS_FAILURE if failed else RELOADS_SUCCESS)
        self._daemon[LAST_RELOAD], self._daemon[LAST_RELOAD_FAILED] = time_of_day(), failed

    # Available in every process; the results include workers that were started later

    def totals(self) -> dict[str, int]:
        """The open connections, and all counters since the daemon started."""
        used = self.daemon[SLOTS]
        return {
            name: sum(self._column(field, used))
            for field, name in enumerate(WORKER.names)
            if field >= OPEN
        }

    def deaths(self) -> int:
        """The number of workers that have died."""
        return sum(self.daemon[WORKERS_DIED_EXIT : WORKERS_DIED_KILL_TIMEOUT + 1])

    def events(self) -> dict[str, int]:
        """The counters of the daemon as a whole."""
        return {
            row.name: self.daemon[field] for field, row in enumerate(DAEMON.rows) if row.metric
        }

    def workers(self) -> list[list[int]]:
        """The numbers of each worker that is running or about to run."""
        used = self.daemon[SLOTS]
        rows = zip(*(self._column(field, used) for field in range(len(WORKER.rows))), strict=True)
        return [list(row) for row in rows if row[PID]]

    def loads(self) -> list[int]:
        """The number of connections of each worker that is not exiting, including workers that
        have only just been started."""
        used = self.daemon[SLOTS]  # read once: meanwhile, the supervisor may start another worker
        columns = (self._column(field, used) for field in (HEARTBEAT, STATE, OPEN))
        rows = zip(*columns, strict=True)
        return [count for beat, state, count in rows if beat and state != EXITING]

    def excess(self, generation: int, share: int) -> float:
        """The number of connections that workers have, or are about to have, beyond a `share`
        each. It is infinite while one of them is exiting or belongs to another generation, because
        connections then move."""
        used = self.daemon[SLOTS]
        fields = (HEARTBEAT, GENERATION, STATE, EXPECTED, OPEN)
        excess = 0.0
        for beat, other, state, expected, count in zip(
            *(self._column(field, used) for field in fields), strict=True
        ):
            if beat and (other != generation or state == EXITING):
                return math.inf
            excess += max(0, count + expected - share)
        return excess

    def open(self) -> int:
        """The total number of connections of all workers."""
        return sum(self._column(OPEN, self.daemon[SLOTS]))

    def peak(self) -> int:
        """The largest number of connections that were open at the same time."""
        return max([self.daemon[PEAK], *self._column(MOST_TOGETHER, self.daemon[SLOTS])])

    def accepted_from(self, number: int) -> int | None:
        """The connections accepted from a listener since the daemon started; None if they are
        counted together with those of others."""
        if number >= LISTENERS - 1:
            return None
        return sum(self._column(ACCEPTED_FROM + number, self.daemon[SLOTS]))

    def _column(self, field: int, used: int) -> list[int]:
        return self._slots[field : used * _ROW : _ROW].tolist()


def _published(size: int) -> tuple[mmap.mmap, mmap.mmap]:
    """Memory to write to, and the same memory, but read-only. If no file can be created
    (RLIMIT_FSIZE), both are one mapping, which workers can also write to."""
    try:
        return memfd.published(size)
    except OSError as error:
        text = "the counters of the supervisor are not protected from its workers: %s%s"
        log.warning(text, error, remedy(error))
        shared = mmap.mmap(-1, size)
        return shared, shared


def time_of_day() -> int:
    """CLOCK_REALTIME in the scoreboard's unit (microseconds)."""
    return int(time() * 1_000_000)


class Slot(NamedTuple):
    """A worker's place: `numbers` are those of WORKER."""

    row: int
    numbers: memoryview
    earlier: int  # connections that earlier workers had in this slot

    @property
    def connections(self) -> int:
        """The number of connections that its worker has had."""
        return int(self.numbers[ACCEPTED] + self.numbers[HANDED_OVER_IN] - self.earlier)
