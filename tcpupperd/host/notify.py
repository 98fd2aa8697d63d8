"""What the service manager is told: sd_notify(3), and the watchdog it asks for.

The datagrams are sent by `sdnotify`, whose faults are contained here: it encodes as Latin-1 where
the protocol wants UTF-8, it may block, it keeps a socket that goes stale, and it has no
descriptors. So each message is encoded first and has a notifier of its own, which is made to wait
no longer than a moment; messages with descriptors are sent here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from time import monotonic

log = logging.getLogger(__name__)

#: Seconds to wait for a service manager that does not read; then the message is given up.
SEND_TIMEOUT = 0.2


class Notifier:
    """Tells the service manager named by NOTIFY_SOCKET how the service is; without one, nobody.

    To notify never fails: what cannot be sent is logged, once until it works again.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._failed = False
        self._status = ""
        self.watchdog_interval = watchdog_interval(environ) if self._address else 0.0

    @property
    def listening(self) -> bool:
        """Whether there is a service manager."""
        return bool(self._address)

    def ready(self) -> None:
        """Started, or reloaded, well or not."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Reloading; `ready` must follow. The time lets systemd 253 and later tell this from an
        earlier reload."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={int(monotonic() * 1_000_000)}")

    def stopping(self) -> None:
        """Stopping."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """What `systemctl status` shows; only sent if it is new."""
        if text != self._status:
            self._status = text
            self._send("STATUS=" + " ".join(text.split()))

    def watchdog(self) -> None:
        """Alive."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Starting or stopping takes up to this long from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def store(self, name: str, fd: int) -> None:
        """Have the service manager keep a descriptor for the next run, which finds it among those
        passed in. FDPOLL=0: to be kept whatever becomes of its other end."""
        self._send_file(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)

    def forget(self, name: str) -> None:
        """Have the service manager close what it keeps under a name."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            from sdnotify import SystemdNotifier  # not needed where nobody listens

            notifier = SystemdNotifier(debug=True)
            with notifier.socket as connection:
                connection.settimeout(SEND_TIMEOUT)
                notifier.notify(state.encode().decode("latin-1"))
        except (OSError, ImportError) as error:
            self._complain(state, error)
        else:
            self._failed = False

    def _send_file(self, state: str, fd: int) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.settimeout(SEND_TIMEOUT)
                connection.connect(self._address.replace("@", "\0", 1))
                socket.send_fds(connection, [state.encode()], [fd])
        except OSError as error:
            self._complain(state, error)

    def _complain(self, state: str, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            log.warning(
                "cannot tell the service manager %s: %s", state.split(maxsplit=1)[0], error
            )


def watchdog_interval(environ: Mapping[str, str]) -> float:
    """Seconds within which the service manager wants to hear from this process, or 0.

    By sd_watchdog_enabled(3): WATCHDOG_USEC, if WATCHDOG_PID is this process or not set.
    """
    with contextlib.suppress(ValueError):
        if int(environ.get("WATCHDOG_PID") or os.getpid()) == os.getpid():
            return max(0, int(environ.get("WATCHDOG_USEC", "0"))) / 1_000_000
    return 0.0
