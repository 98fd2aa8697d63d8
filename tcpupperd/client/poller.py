"""One epoll instance, and a callable for each descriptor."""

import math
import select
from collections.abc import Callable


class Poller:
    """A callable is due once for everything that has happened since its last call (EPOLLET), so it
    must receive and send until the kernel has no more."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callables: dict[int, Callable[[], None]] = {}

    def watch(self, descriptor: int, callable_: Callable[[], None]) -> None:
        """Watch a descriptor until it is closed."""
        self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        self._callables[descriptor] = callable_

    def wait(self, seconds: float) -> list[Callable[[], None]]:
        """Wait at most this many seconds; return the callables that are due."""
        timeout = None if seconds == math.inf else max(0.0, seconds)
        events = self._epoll.poll(timeout, max(1, len(self._callables)))
        return [self._callables[descriptor] for descriptor, _ in events]
