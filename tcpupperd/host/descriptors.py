"""File descriptors: what has one, and how many there may be."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import Protocol


class HasFileno(Protocol):
    """A socket, a file, or the like."""

    def fileno(self) -> int: ...


def limit() -> int:
    """How many descriptors this process may have: the soft RLIMIT_NOFILE of getrlimit(2)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> None:
    """Take all descriptors that the hard limit allows: the soft one is for select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Sharing:
    """Whether a process that was forked from this one may have its files open, too.

    Then close(2) ends nothing: a connection stays open, and its file stays in the epoll.
    """

    possible = False


def _forked_from() -> None:
    Sharing.possible = True


def _forked() -> None:
    Sharing.possible = False


os.register_at_fork(after_in_parent=_forked_from, after_in_child=_forked)
