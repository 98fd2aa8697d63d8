"""Counters and heartbeats that all processes of the daemon share.

One anonymous shared mapping has a row of 64-bit numbers for the daemon and one, a slot, for each
worker. The supervisor writes the first row and prepares slots, a worker writes its own slot only,
and all processes read all of it. No lock is needed, because writing an aligned 64-bit number is
atomic, and because counters never move: a slot keeps them when its worker has exited, and the next
worker goes on from there. So nobody ever sees a total that is too low, or that counts twice.
"""

from __future__ import annotations

import mmap
from time import time
from typing import NamedTuple

from tcpupperd.serving.counters import (
    ACCEPTED,
    EARLIER_LINES,
    FIELDS,
    HEARTBEAT,
    LEAVING,
    LINES,
    OPEN,
    PID,
    STARTED,
    STATE,
    TAKEN,
    microseconds,
)

_ROW_SIZE = 512  # bytes: whole cache lines, so that workers do not slow each other
_ROW = _ROW_SIZE // 8  # numbers

#: The numbers of the daemon. Times are CLOCK_REALTIME in microseconds.
DAEMON = (
    "slots",  # that were ever in use
    "began",  # when this process began
    "workers_started",
    "workers_exited",  # by themselves, without having been told to
    "workers_signalled",  # killed by others
    "workers_hung",  # killed for not having shown a sign of life
    "workers_late",  # killed for not having left in time
    "lost",  # connections that ended with a worker
    "restarts",  # that connections could survive, up to now
    "reloads",
    "reloads_failed",
    "loaded",  # when the configuration in use came into force
    "last_reload",  # when the last reload ended, or 0
    "last_reload_failed",  # whether it did
    "file_number",  # of the file that is in force: inode, 0 if there is none
    "file_time",  # the time of its last change, in nanoseconds
    "leaves",  # whether it was told to stop, and new clients should go elsewhere
)
(
    SLOTS,
    BEGAN,
    WORKERS_STARTED,
    WORKERS_EXITED,
    WORKERS_SIGNALLED,
    WORKERS_HUNG,
    WORKERS_LATE,
    LOST,
    RESTARTS,
    RELOADS,
    RELOADS_FAILED,
    LOADED,
    LAST_RELOAD,
    LAST_RELOAD_FAILED,
    FILE_NUMBER,
    FILE_TIME,
    LEAVES,
) = range(len(DAEMON))


class Scoreboard:
    """The numbers of the daemon, and of up to `size` workers at a time."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, (1 + size) * _ROW_SIZE))
        self._numbers = self._memory.cast("Q")
        self.daemon = self._numbers[:_ROW]  # its DAEMON numbers
        self.daemon[BEGAN] = time_of_day()
        self._free = list(reversed(range(1, 1 + size)))

    def claim(self) -> Slot:
        """Return a slot for a new worker. Raises IndexError if all are taken."""
        row = self._free.pop()
        start = row * _ROW_SIZE
        numbers = self._memory[start : start + len(FIELDS) * 8].cast("Q")
        numbers[STARTED] = numbers[HEARTBEAT] = microseconds()
        numbers[EARLIER_LINES] = numbers[LINES]
        self.daemon[SLOTS] = max(self.daemon[SLOTS], row)
        self.daemon[WORKERS_STARTED] += 1
        return Slot(row, numbers, numbers[ACCEPTED] + numbers[TAKEN])

    def release(self, slot: Slot) -> None:
        """Free the slot of a worker that has exited; its counters stay in the totals."""
        for field in range(OPEN + 1):
            slot.numbers[field] = 0
        self._free.append(slot.row)

    def loaded(self, file: tuple[int, int]) -> None:
        """Note that a configuration has come into force, with the identity of its file."""
        self.daemon[LOADED] = time_of_day()
        self.daemon[FILE_NUMBER], self.daemon[FILE_TIME] = file

    def reload_ended(self, *, failed: bool) -> None:
        """Count a reload."""
        self.daemon[RELOADS_FAILED if failed else RELOADS] += 1
        self.daemon[LAST_RELOAD], self.daemon[LAST_RELOAD_FAILED] = time_of_day(), failed

    # Visible to every process, even for workers that were started later

    def totals(self) -> dict[str, int]:
        """The open connections, and all counters since the daemon started."""
        used = self.daemon[SLOTS]
        return {
            name: sum(self._column(field, used))
            for field, name in enumerate(FIELDS)
            if field >= OPEN
        }

    def deaths(self) -> int:
        """The number of workers that did not end as they should."""
        return sum(self.daemon[WORKERS_EXITED : WORKERS_LATE + 1])

    def events(self) -> dict[str, int]:
        """The counters of the daemon as a whole."""
        return {DAEMON[field]: self.daemon[field] for field in range(WORKERS_STARTED, LOADED)}

    def workers(self) -> list[list[int]]:
        """The numbers of each worker that runs, or is about to."""
        used = self.daemon[SLOTS]
        rows = zip(*(self._column(field, used) for field in range(len(FIELDS))), strict=True)
        return [list(row) for row in rows if row[PID]]

    def loads(self) -> list[int]:
        """The number of connections of each worker that is not leaving, including those that have
        only just been started."""
        used = self.daemon[SLOTS]  # once: the supervisor may start another worker meanwhile
        columns = (self._column(field, used) for field in (HEARTBEAT, STATE, OPEN))
        rows = zip(*columns, strict=True)
        return [count for beat, state, count in rows if beat and state != LEAVING]

    def open(self) -> int:
        """The number of connections of all workers."""
        return sum(self._column(OPEN, self.daemon[SLOTS]))

    def _column(self, field: int, used: int) -> list[int]:
        return self._numbers[_ROW + field : (1 + used) * _ROW : _ROW].tolist()


def time_of_day() -> int:
    """CLOCK_REALTIME, as the scoreboard has it."""
    return int(time() * 1_000_000)


class Slot(NamedTuple):
    """A worker's place: `numbers` are its FIELDS."""

    row: int
    numbers: memoryview
    earlier: int  # connections that earlier workers ever had

    @property
    def connections(self) -> int:
        """The number of connections that its worker ever had."""
        return int(self.numbers[ACCEPTED] + self.numbers[TAKEN] - self.earlier)
