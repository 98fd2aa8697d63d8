"""Signals as input of an event loop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterable
from contextlib import suppress


class Signals:
    """A descriptor that is readable when signals have arrived."""

    def __init__(self, numbers: Iterable[int]) -> None:
        """Take over these signals, if there are any."""
        self._receiving, self._sending = socket.socketpair()
        self._receiving.setblocking(False)
        self._sending.setblocking(False)
        for number in numbers:
            signal.set_wakeup_fd(self._sending.fileno(), warn_on_full_buffer=False)
            signal.signal(number, _note)

    def fileno(self) -> int:
        """The descriptor."""
        return self._receiving.fileno()

    def add(self, number: int) -> None:
        """Add a signal that another loop has received."""
        with suppress(BlockingIOError):
            self._sending.send(bytes([number]))

    def received(self) -> bytes:
        """The numbers of the signals that have arrived since the last call."""
        with suppress(BlockingIOError):
            return self._receiving.recv(4096)
        return b""


def _note(number: int, frame: object) -> None:
    """The handler: Python itself writes the number to the wake-up descriptor."""
