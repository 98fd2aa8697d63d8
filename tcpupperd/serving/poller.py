"""One epoll, and what is to be called for everything in it that is not a connection."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from time import monotonic

from tcpupperd.host.descriptors import HasFileno


class Poller:
    """Waits until a descriptor is ready, or until it is woken from another thread.

    `now` is the time (CLOCK_MONOTONIC) at which the last wait ended: all of a turn happens then.
    """

    def __init__(self) -> None:
        self.now = monotonic()
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], object]] = {}
        self._waker = Waker()
        self.add(self._waker, self._waker.forget)

    def fileno(self) -> int:
        """The epoll: readable when there is something to do."""
        return self._epoll.fileno()

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        """The descriptors that are ready and their events; none after `timeout` seconds."""
        ready = self._epoll.poll(timeout)
        self.now = monotonic()
        return ready

    def look_at_clock(self) -> None:
        """Have `now` right outside a turn."""
        self.now = monotonic()

    def wake(self) -> None:
        """End the wait, or the next one at once; from any thread, and also after `close`."""
        self._waker.wake()

    # What is called

    def add(
        self, file: HasFileno, call: Callable[[], object], events: int = select.EPOLLIN
    ) -> None:
        """Have `call` called when one of the epoll events comes."""
        self._epoll.register(file, events)
        self._calls[file.fileno()] = call

    def remove(self, file: HasFileno) -> None:
        """The opposite of `add`, before the file is closed."""
        del self._calls[file.fileno()]
        self._epoll.unregister(file)

    def dispatch(self, fd: int) -> None:
        """Call what was added for a descriptor that is ready."""
        call = self._calls.get(fd)
        if call is not None:  # else it was removed earlier in this turn
            try:
                call()
            except BlockingIOError:
                return  # somebody else was faster

    # What somebody else calls

    def watch(self, fd: int, events: int) -> None:
        """Have a descriptor among those that are ready when one of the epoll events comes."""
        self._epoll.register(fd, events)

    def watch_for(self, fd: int, events: int) -> None:
        """Wait for other events."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """The opposite of `watch`.

        Not left to close(2): that does not take a file out of the epoll while another process,
        forked from this one, has it open. A closed descriptor is no error.
        """
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Release the descriptors; to be done twice is no error."""
        self._waker.close()
        self._epoll.close()


class Waker:
    """Ends the wait of a poller from another thread."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Between two threads, one of which closes: the number may be somebody else's by then.
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._fd

    def wake(self) -> None:
        """End the wait; from any thread."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def forget(self) -> None:
        """Be ready to wake again."""
        os.eventfd_read(self._fd)

    def close(self) -> None:
        """Release the descriptor."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
