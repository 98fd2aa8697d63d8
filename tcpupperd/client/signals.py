"""Signals as input of an event loop."""

import contextlib
import os
import signal
from types import FrameType

#: Signals that end a run. The second one does so at once, even while output is stuck.
ENDS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """From its creation, the signals that end a run, and SIGQUIT, make a descriptor readable.

    A signal that the shell ignores for a background job stays ignored.
    """

    def __init__(self) -> None:
        self.descriptor, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in (*ENDS, signal.SIGQUIT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, once if number in ENDS else every_time)

    def received(self) -> set[int]:
        """The signals since the last call."""
        with contextlib.suppress(BlockingIOError):
            return set(os.read(self.descriptor, 4096))
        return set()


def once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def every_time(number: int, frame: FrameType | None) -> None:
    """Only the descriptor matters."""
