"""One event loop: an epoll instance, with a callable for each descriptor that is not a connection,
for each time at which something is due, and for each loop iteration."""

from __future__ import annotations

import contextlib
import math
import os
import select
from collections.abc import Callable
from time import monotonic

from outlive.descriptors import HasFileno
from tcpupperd.serving.timers import Timer, Timers


class Poller:
    """Waits until a descriptor is ready or a timer is due, or until it is woken from another
    thread or a signal handler.

    `now` is the time (CLOCK_MONOTONIC) at which the last wait ended; it stays the same for the
    whole loop iteration.
    """

    def __init__(self) -> None:
        self.now = monotonic()
        self._epoll = select.epoll()
        #: Make `wait` return a descriptor (to be handled by the caller) whenever one of the given
        #: epoll events occurs; `watch_for` changes the events.
        self.watch: Callable[[int, int], None] = self._epoll.register
        self.watch_for: Callable[[int, int], None] = self._epoll.modify
        self._calls: dict[int, Callable[[], object]] = {}
        self._timers = Timers()
        #: What to call in each loop iteration.
        self.each: list[Callable[[], object]] = []
        self._waker = Waker()
        self.add(self._waker, self._waker.forget)

    def fileno(self) -> int:
        """The epoll descriptor, which is readable when there is something to do."""
        return self._epoll.fileno()

    def wait(self, at_most: float = math.inf) -> list[tuple[int, int]]:
        """Return the ready descriptors with their events, or none when a timer is due or after
        `at_most` seconds."""
        ready = self._epoll.poll(self.timeout(at_most))
        self.now = monotonic()
        return ready

    def timeout(self, at_most: float = math.inf) -> float | None:
        """Seconds until a timer is due, but at most as many as given; None means forever."""
        left = min(at_most, self._timers.next - monotonic())
        return None if left == math.inf else max(0.0, left)

    def finish(self) -> None:
        """End a loop iteration: call what is due, and what is called in each iteration."""
        if self._timers.next <= self.now:
            self._timers.run_due(self.now)
        for call in tuple(self.each):  # a copy, because a call may add or remove another one
            call()

    def at(self, when: float, call: Callable[[], object] = lambda: None) -> Timer:
        """Call `call` once, in the first loop iteration at or after `when`. Without `call`, only
        end the wait: what is called in each iteration does the rest."""
        timer = Timer(self._timers, call)
        timer.set(when)
        return timer

    def update_clock(self) -> None:
        """Update `now` outside a loop iteration."""
        self.now = monotonic()

    def wake(self) -> None:
        """Interrupt the current or the next wait. May be called from any thread or signal handler,
        and after `close`."""
        self._waker.wake()

    # Descriptors with a callable

    def add(
        self, file: HasFileno, call: Callable[[], object], events: int = select.EPOLLIN
    ) -> None:
        """Call `call` whenever one of the epoll events occurs."""
        self._epoll.register(file, events)
        self._calls[file.fileno()] = call

    def remove(self, file: HasFileno) -> None:
        """Undo `add`. Call this before closing the file."""
        del self._calls[file.fileno()]
        self._epoll.unregister(file)

    def dispatch(self, fd: int) -> None:
        """Call the callable for a descriptor that is ready."""
        call = self._calls.get(fd)
        if call is not None:  # otherwise it was removed earlier in this loop iteration
            try:
                call()
            except BlockingIOError:
                return  # another process got there first

    # Descriptors without a callable, for the caller of `wait`

    def unwatch(self, fd: int) -> None:
        """Undo `watch`.

        close(2) is not enough: it does not remove a file from the epoll instance while a forked
        process has it open. A descriptor that is already closed is not an error.
        """
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Close the descriptors; a second call does nothing."""
        self._waker.close()
        self._epoll.close()


class Waker:
    """Interrupts the wait of a poller from another thread or from a signal handler.

    It has no lock: a signal handler would wait forever for the thread that it interrupted, and a
    forked process for a thread that it does not have. Instead, any thread that uses the descriptor
    keeps it open. Otherwise, its number could be reused in the meantime.
    """

    def __init__(self) -> None:
        self._event: Eventfd | None = Eventfd()

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._event.fd if self._event else -1

    def wake(self) -> None:
        """Interrupt the wait. May be called from any thread or signal handler."""
        if event := self._event:
            os.eventfd_write(event.fd, 1)

    def forget(self) -> None:
        """Reset the event, so that `wake` works again."""
        if event := self._event:
            os.eventfd_read(event.fd)

    def close(self) -> None:
        """Close the descriptor, once no thread uses it."""
        self._event = None


class Eventfd:
    """An eventfd(2), which is closed when nothing refers to it any more."""

    fd = -1  # if it cannot be created

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
