"""File descriptors: what has one, and how many there may be."""

from __future__ import annotations

import contextlib
import resource
from typing import Protocol


class HasFileno(Protocol):
    """A socket, a file, or the like."""

    def fileno(self) -> int: ...


def limit() -> int:
    """How many descriptors this process may have: the soft RLIMIT_NOFILE of getrlimit(2)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def hard_limit() -> int:
    """How many it may have after `raise_limit`."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def raise_limit() -> None:
    """Take all descriptors that the hard limit allows: the soft one is for select(2)."""
    hard = hard_limit()
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
