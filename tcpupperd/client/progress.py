"""The progress of a long input, shown with tqdm, if installed, on an otherwise unused terminal."""

from __future__ import annotations

import math
import os
import stat
import sys
import time

TYPE_CHECKING = False  # as in typing, which the client does not import
if TYPE_CHECKING:
    from typing import Any, Self

LONG = 1.0  # seconds after which an input is long; importing tqdm takes a tenth of that


class Progress:
    """A context manager with a bar that shows the bytes, their rate and, if the size of the input
    is known, the time left."""

    def __init__(self, source: int, output: int) -> None:
        """Input is read from the descriptor ``source``, and answers go to ``output``."""
        self._size = remaining(source)
        is_useful = not os.isatty(source) and not os.isatty(output) and is_seen()
        self._begin = time.monotonic() + LONG if is_useful else math.inf
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int) -> None:
        """Show that ``done`` bytes have been answered."""
        if time.monotonic() >= self._begin:
            self._begin = math.inf
            self._bar = make_bar(done, self._size)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)


def is_seen() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def remaining(source: int) -> int | None:
    """The bytes from the position of a regular file to its end; None for anything else."""
    status = os.fstat(source)
    if not stat.S_ISREG(status.st_mode):
        return None
    return max(0, status.st_size - os.lseek(source, 0, os.SEEK_CUR))


def make_bar(done: int, size: int | None) -> Any:
    """A bar that starts at ``done``; None without tqdm."""
    try:
        from tqdm import tqdm  # slow to import
    except ImportError:
        return None
    tqdm.monitor_interval = 0  # no thread
    return tqdm(total=size, initial=done, unit="B", unit_scale=True, unit_divisor=1024, miniters=1)
