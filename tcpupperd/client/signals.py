"""Signals as input for an event loop."""

import contextlib
import os
import signal
from types import FrameType

#: Signals that stop a run. A second one does so immediately, even while output is blocked.
ENDS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Once created, makes a descriptor readable on SIGQUIT and on the signals that stop a run.

    A signal that the shell ignores for a background job stays ignored.
    """

    def __init__(self) -> None:
        self.descriptor, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in (*ENDS, signal.SIGQUIT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, once if number in ENDS else every_time)

    def received(self) -> set[int]:
        """The signals received since the last call."""
        with contextlib.suppress(BlockingIOError):
            return set(os.read(self.descriptor, 4096))
        return set()


def once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def every_time(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing; the wake-up descriptor does the work."""
