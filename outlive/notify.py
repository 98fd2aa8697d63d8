"""Notifications to the service manager, sd_notify(3), and its watchdog."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TypeVar

from outlive.memfd import sealed
from outlive.remedies import remedy

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds to wait for a service manager that does not read, before the message is dropped.
SEND_TIMEOUT = 0.2


class Notifier:
    """Reports the state of the service to the service manager at NOTIFY_SOCKET, if there is one.

    Notifying never fails: if messages, or descriptors, cannot be sent, this is logged once until
    it works again.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._failing: set[str] = set()
        self._status = ""
        self.watchdog_interval = watchdog_interval(environ) if self._address else 0.0

    @property
    def listening(self) -> bool:
        """Whether there is a service manager."""
        return bool(self._address)

    def ready(self) -> None:
        """The start or a reload is complete, even if the reload failed."""
        self._send("READY=1")

    def reloading(self) -> None:
        """A reload begins; `ready` must follow. The timestamp lets systemd 253 and later
        distinguish it from an earlier reload."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={int(monotonic() * 1_000_000)}")

    def stopping(self) -> None:
        """The service is stopping."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Set the text that `systemctl status` shows; sent only if it has changed."""
        if text != self._status:
            self._status = text
            self._send("STATUS=" + " ".join(text.split()))

    def watchdog(self) -> None:
        """Send a keep-alive notification."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Announce that the start or stop will take up to this long from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def store_descriptor(self, name: str, fd: int) -> bool:
        """Have the service manager keep a descriptor and pass it to the next run. With FDPOLL=0,
        it is kept even if its other end hangs up. Returns whether it could be sent: this may fail
        while other descriptors are in flight (ETOOMANYREFS in unix(7))."""
        return self._send_file(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)

    def remove_descriptor(self, name: str) -> None:
        """Have the service manager close the descriptors that it keeps under this name."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def replace_stored(self, name: str, content: bytes) -> bool:
        """Replace what is kept under this name by a memfd; return whether that could be sent.
        Raises OSError if no memfd can be written; then what was kept stays there."""
        file = sealed(content)
        self.remove_descriptor(name)
        sent = self.store_descriptor(name, file)
        os.close(file)
        return sent

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with NotifySocket(self._address) as one:
                self.transmit(one, state)
        except (OSError, ImportError) as error:
            self._log_problem("messages", state, error)
        else:
            self._failing.discard("messages")

    def transmit(self, one: NotifySocket, state: str) -> None:
        """Send a message; a program that has a library for this can override it. Raises OSError,
        or ImportError if there is no such library."""
        one.sendall(state.encode())

    def _send_file(self, state: str, fd: int) -> bool:
        if not self._address:
            return True
        try:
            with NotifySocket(self._address) as one:
                one.send_file(state.encode(), fd)
        except OSError as error:
            self._log_problem("descriptors", state, error)
            return False
        self._failing.discard("descriptors")
        return True

    def _log_problem(self, what: str, state: str, error: Exception) -> None:
        if what not in self._failing:
            self._failing.add(what)
            name = state.split(maxsplit=1)[0]
            log.warning("cannot send %s to the service manager: %s%s", name, error, remedy(error))


class NotifySocket(socket.socket):
    """Sends to the service manager without connect(2), which the unit denies: it would let an
    attacker in a worker connect sockets that were passed in."""

    def __init__(self, address: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.settimeout(SEND_TIMEOUT)
        self._manager = address.replace("@", "\0", 1)

    def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
        """Send a message."""
        self.sendto(data, flags, self._manager)

    def send_file(self, data: bytes, fd: int) -> None:
        """Send a descriptor along with a message."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))
        self.sendmsg([data], [rights], 0, self._manager)


def send_in_turn(missing: dict[str, T], send: Callable[[str, T], bool]) -> None:
    """Send what is missing from the store, by name, until something cannot be sent."""
    for name, content in list(missing.items()):
        if not send(name, content):
            return
        del missing[name]


def watchdog_interval(environ: Mapping[str, str]) -> float:
    """Seconds within which the service manager expects a keep-alive notification, or 0.

    As in sd_watchdog_enabled(3): WATCHDOG_USEC, if WATCHDOG_PID is this process or is not set.
    """
    with contextlib.suppress(ValueError):
        if int(environ.get("WATCHDOG_PID") or os.getpid()) == os.getpid():
            return max(0, int(environ.get("WATCHDOG_USEC", "0"))) / 1_000_000
    return 0.0
