"""A run of `serve_forever`, which any thread or signal handler may stop."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from outlive.descriptors import Sharing


class Run:
    """The run of a server, which may be followed by others."""

    def __init__(self, wake: Callable[[], object]) -> None:
        """Created with the server. `wake` makes the thread that serves check `stop_requested`."""
        self.stop_requested = False
        self.process = 0  # the one that serves
        self._wake = wake
        self._forks = Sharing.forks
        self._lock = threading.RLock()

    @property
    def is_shared(self) -> bool:
        """Whether a forked process may have the descriptors of this server too."""
        return Sharing.forks != self._forks

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Run in this thread."""
        self.process = os.getpid()
        # A new lock for each run, because a thread that waits for its release may be late, and a
        # forked process may have a copy that no thread releases. It is reentrant, because a signal
        # handler that calls `stop` may interrupt a thread that holds it.
        lock = self._lock = threading.RLock()
        with lock:
            try:
                yield
            finally:
                self.stop_requested = False

    def stop(self) -> None:
        """Request the end of the run, and wait for it, unless this thread itself runs. In a
        process forked from the one that serves, this does nothing."""
        if self.process not in (0, os.getpid()):
            return
        self.stop_requested = True
        self._wake()
        with self._lock:
            pass
