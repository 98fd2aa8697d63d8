"""File descriptors: objects that have one, and the limit on their number."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import Protocol


class HasFileno(Protocol):
    """A socket, a file, or a similar object."""

    def fileno(self) -> int: ...


def limit() -> int:
    """The number of descriptors that this process may have: the soft limit RLIMIT_NOFILE, see
    getrlimit(2)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> None:
    """Raise the soft limit to the hard limit: the soft limit is lower only for the sake of
    programs that use select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Sharing:
    """Whether a process forked from this one may also have its files open.

    If so, close(2) is not enough: the connection stays open, and its file stays in the epoll
    instance.
    """

    possible = False
    forks = 0  # the number of forks in which this process was the parent or the child


def _forked_from() -> None:
    Sharing.possible = True
    Sharing.forks += 1


def _forked() -> None:
    Sharing.possible = False
    Sharing.forks += 1


os.register_at_fork(after_in_parent=_forked_from, after_in_child=_forked)
