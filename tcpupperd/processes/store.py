"""The file descriptor store of the service manager, which keeps descriptors for the next process.

It contains the two ends of the handover channel, the last good configuration, the number of
restarts, a canary, and spare listeners. Any other descriptor in it, whether damaged or from
another version, is closed and removed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterable
from time import monotonic
from typing import Self

from outlive import channel
from outlive.canary import CANARY, Canary, canary
from outlive.memfd import read_sealed
from outlive.notify import Notifier, send_in_turn
from outlive.remedies import remedy
from outlive.send_queue import send_queue
from tcpupperd.config_file import FILE_SIZE_MAX
from tcpupperd.host.messages import RateLimitedLog
from tcpupperd.processes import spares
from tcpupperd.processes.spares import Spares

log = logging.getLogger(__name__)

CONFIGURATION, RESTARTS = "last-good-configuration", "restarts"

#: The names of the daemon's descriptors in the store.
NAMES = channel.NAMES | {CONFIGURATION, CANARY, RESTARTS}

#: Problems for the status line.
LOST = "a restart will close all connections: the descriptor store does not work"
NOT_STORED = "the last good configuration is not stored; see the log"

#: Seconds until what could not be sent to the service manager is sent again.
RETRY = 1.0

#: The largest stored number that is accepted.
RESTARTS_MAX = 2**32

#: Seconds between two replacements of a channel that was shut down.
MEND_INTERVAL = 5.0


class Store:
    """The daemon's part of the service manager's store."""

    def __init__(
        self,
        stored: Iterable[tuple[str, int]],
        notifier: Notifier,
        *,
        offered: bool,
        socket_unit: str = "",
    ) -> None:
        """Use the `stored` descriptors, given with their names. If a store is `offered`, add what
        is missing from it; with a `socket_unit`, also spares of its listeners."""
        self._notifier = notifier
        self.configuration: str | None = None  # the stored text; "" means all defaults
        self.restarts = 0  # that the channel has survived
        self._failure = ""  # for the status line
        self._warnings = RateLimitedLog(log)
        ends, listeners = self._classify(stored)
        self.spares = Spares(listeners, notifier, socket_unit if offered else "")
        self._survived = ends.keys() == channel.NAMES
        self.channel = channel.open_channel(ends, notifier, store=offered)
        self._mend_at = 0.0
        self.restarts = self.restarts + 1 if self._survived else 0
        self._canary: Canary | None = None  # once it could be sent
        self._missing: dict[str, str] = {}  # what is to be sent: names and texts
        if self.channel.outlives_us:
            self._missing = {RESTARTS: str(self.restarts), CANARY: ""}
            self._send_missing()
        elif offered:
            self._failure = LOST

    def _classify(
        self, stored: Iterable[tuple[str, int]]
    ) -> tuple[dict[str, socket.socket], list[tuple[str, int]]]:
        """Read the stored texts; return the ends of the channel and the spare listeners."""
        ends: dict[str, socket.socket] = {}
        listeners = []
        for name, fd in stored:
            if name == CONFIGURATION:
                self._read_configuration(fd)
            elif name == RESTARTS:
                self._read_restarts(fd)
            elif name in spares.NAMES:
                listeners.append((name, fd))
            elif name in channel.NAMES and name not in ends and channel.is_end(fd):
                ends[name] = socket.socket(fileno=fd)
            else:
                self._drop(name, fd)
        return ends, listeners

    @property
    def keeps(self) -> bool:
        """Whether the content of the channel survives a restart, because the store really exists.
        As long as no canary could be sent, it is assumed to if it has just survived one."""
        proven = self._canary.is_alive if self._canary else self._survived
        return self.channel.outlives_us and proven

    @property
    def holds_connections(self) -> bool:
        """Whether there are connections in the channel that nobody has taken over."""
        return send_queue(self.channel.send_end) > 0

    @property
    def check_at(self) -> float:
        """When `check` must be called even if nothing happens: it has to send something again."""
        return monotonic() + RETRY if self._missing or self.spares.missing else math.inf

    @property
    def problem(self) -> str:
        """For the status line: that the store does not work, or that a socket unit was changed."""
        return "; ".join(filter(None, (self._failure, self.spares.remedy)))

    def mend_channel(self) -> bool:
        """Replace the channel if a process has shut it down; return whether it was replaced. The
        rate is limited, because that process may do it again."""
        now = monotonic()
        if now < self._mend_at or not channel.is_shut_down(self.channel):
            return False
        self._mend_at = now + MEND_INTERVAL
        self.channel = channel.replaced(self.channel, self._notifier)
        return True

    def check(self) -> None:
        """Send what could not be sent before. Log once if the service manager does not keep
        descriptors although it claims to."""
        self.spares.store_rest()
        if self._missing:
            self._send_missing()
            self.watch()
        if self._failure == LOST or self._canary is None or self._canary.is_alive:
            return
        self._failure = LOST
        log.warning(
            "the service manager does not keep file descriptors, so a restart will close all"
            " connections; set FileDescriptorStoreMax=512 in the unit, or FDSTORE=0 in its"
            " environment"
        )

    def watch(self) -> None:
        """Have the kernel send SIGIO to this process when the store is emptied."""
        if self._canary:
            self._canary.watch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close this process's descriptors; those in the store stay there."""
        self.channel.send_end.close()
        self.channel.receive_end.close()
        if self._canary:
            self._canary.close()

    def keep_configuration(self, text: str) -> None:
        """Store the last good configuration, replacing the previous one."""
        if text == self.configuration or not self.channel.outlives_us:
            return
        self._missing[CONFIGURATION] = text
        self._send_missing()
        self.configuration = text

    def _read_configuration(self, fd: int) -> None:
        try:
            self.configuration = read_sealed(fd, FILE_SIZE_MAX).decode()
        except (OSError, ValueError) as error:
            log.warning("the stored configuration cannot be used: %s", error)
            self._notifier.remove_descriptor(CONFIGURATION)
        os.close(fd)

    def _read_restarts(self, fd: int) -> None:
        with contextlib.suppress(OSError, ValueError):  # counting then restarts from 0
            self.restarts = max(0, min(int(read_sealed(fd, FILE_SIZE_MAX).decode()), RESTARTS_MAX))
        os.close(fd)

    def _send_missing(self) -> None:
        """Send what is missing. This fails while too many descriptors are in flight, such as those
        that wait in the channel if the limit is small; it is then tried again later."""
        send_in_turn(self._missing, self._send)

    def _send(self, name: str, text: str) -> bool:
        return self._send_canary() if name == CANARY else self._send_text(name, text)

    def _send_canary(self) -> bool:
        try:
            self._canary = canary(self._notifier)
        except OSError as error:
            self._warnings.warn("cannot tell whether a store exists: %s%s", error, remedy(error))
        return self._canary is not None

    def _send_text(self, name: str, text: str) -> bool:
        """Replace a text in the store. If no memfd can be written, give up: the previous text
        remains there."""
        try:
            sent = self._notifier.replace_stored(name, text.encode())
        except OSError as error:
            log.warning("cannot store %s: %s%s", name, error, remedy(error))
            if name == CONFIGURATION:
                self._failure = self._failure or NOT_STORED
            return True
        if name == CONFIGURATION and self._failure == NOT_STORED:
            self._failure = ""
        return sent

    def _drop(self, name: str, fd: int) -> None:
        os.close(fd)
        if name != CANARY:  # which every process creates again
            log.warning("closing the stored descriptor %s, which cannot be used", name)
            self._notifier.remove_descriptor(name)
