"""Keeps tests apart that the kernel would otherwise let disturb each other.

A descriptor that was sent over a Unix socket is in flight until it is received. A process can send
more only while those of its user, sent by any process, are no more than it may have open itself
(ETOOMANYREFS in unix(7)). So while one test hands over hundreds of connections, a daemon with a
small limit in another test can hand over none: tests of the same user run at the same time in
other processes of pytest-xdist, and in other checkouts. Root is exempt from the limit, but not in
most containers. Containers of the system tests, whose users the kernel counts along with those
outside, have user IDs of their own.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(kind: int) -> Iterator[None]:
    """A context in which this user's lock is held, shared (LOCK_SH) or alone (LOCK_EX)."""
    with Path(tempfile.gettempdir(), f"tcpupperd-tests-{os.geteuid()}.lock").open("w") as file:
        fcntl.flock(file, kind)  # which ends with its process at the latest
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # forks may still have the file open
