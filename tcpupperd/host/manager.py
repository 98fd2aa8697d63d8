"""Notifications to the service manager through `sdnotify`, whose faults are worked around here.

It encodes as Latin-1 where the protocol requires UTF-8, it may block, it keeps a socket that may
go stale, it connects that socket, and it cannot send descriptors. Therefore, each message is
encoded first and has its own notifier, with a socket that has a short timeout and is not
connected; messages with descriptors are sent without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from outlive import notify
from outlive.notify import NotifySocket


class Notifier(notify.Notifier):
    """Reports the state of the daemon to the service manager, if there is one."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(environ)
        if self.listening:  # otherwise it is not needed
            with contextlib.suppress(ImportError):  # reported when something is to be sent
                import sdnotify  # noqa: F401  now, because of upgrades: see `outlive.library`

    def transmit(self, one: NotifySocket, state: str) -> None:
        """Send a message through `sdnotify`."""
        from sdnotify import SystemdNotifier

        notifier = object.__new__(SystemdNotifier)  # its __init__ would connect a socket
        notifier.debug = True
        notifier.socket = one
        notifier.notify(state.encode().decode("latin-1"))
