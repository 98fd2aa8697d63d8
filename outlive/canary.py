"""The canary, which shows whether the service manager keeps descriptors."""

from __future__ import annotations

import fcntl
import os
import select
import socket

from outlive.notify import Notifier

#: The name of the canary in the store.
CANARY = "canary"


def canary(notifier: Notifier) -> Canary | None:
    """A canary that was sent to the store; None if it could not be sent. Raises OSError if there
    can be none."""
    one = Canary(notifier)
    if one.was_sent:
        return one
    one.close()
    return None


class Canary:
    """Shows whether the service manager really keeps descriptors. The variable FDSTORE is not
    proof: a drop-in may contradict it, and may change at any time.

    Only the store holds the other end of a socket pair; when that end is closed, this one hangs
    up. It is stored last, so that if the store is too small, the canary is what does not fit.
    """

    def __init__(self, notifier: Notifier) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        notifier.remove_descriptor(CANARY)  # the canary of the previous process
        self.was_sent = notifier.store_descriptor(CANARY, theirs.fileno())
        theirs.close()
        self._poll = select.poll()
        self._poll.register(self._ours, 0)  # POLLHUP is always reported

    @property
    def is_alive(self) -> bool:
        """Whether the other end is still open: in the store, or on its way there."""
        return not self._poll.poll(0)

    def watch(self) -> None:
        """Have the kernel send SIGIO to this process when the other end is closed."""
        fcntl.fcntl(self._ours, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(self._ours, fcntl.F_GETFL)
        fcntl.fcntl(self._ours, fcntl.F_SETFL, flags | os.O_ASYNC)

    def close(self) -> None:
        """Close this end."""
        self._ours.close()
