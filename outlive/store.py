"""The service manager's file descriptor store, which keeps descriptors for the next process."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterable

from outlive import channel
from outlive.canary import CANARY, Canary, canary
from outlive.memfd import read_sealed
from outlive.notify import Notifier, send_in_turn
from outlive.remedies import remedy

log = logging.getLogger(__name__)

#: The largest content that is kept under a name, in bytes.
SIZE_MAX = 2**24


class Store:
    """The channel, some bytes under names, and a canary.

    What cannot be sent, because too many descriptors are in flight (ETOOMANYREFS), is `missing`
    until a `retry` succeeds.
    """

    def __init__(self, stored: Iterable[tuple[str, int]], notifier: Notifier) -> None:
        """Use the `stored` descriptors, and add what is missing."""
        self._notifier = notifier
        self._contents: dict[str, bytes] = {}
        ends: dict[str, socket.socket] = {}
        for name, fd in stored:
            if name in channel.NAMES and name not in ends and channel.is_end(fd):
                ends[name] = socket.socket(fileno=fd)
            else:
                self._read(name, fd)
        self._survived = ends.keys() == channel.NAMES
        self.channel = channel.open_channel(ends, notifier, store=False)
        self._canary: Canary | None = None
        self._warned = False  # that none can be created
        self._missing: dict[str, bytes] = {}
        if notifier.listening:
            ours = [] if self.channel.outlives_us else [channel.SEND_END, channel.RECEIVE_END]
            # The canary is the last, so that it is what does not fit.
            self._missing = dict.fromkeys([*ours, CANARY], b"")
            self.retry()

    @property
    def keeps(self) -> bool:
        """Whether the service manager really keeps what is stored."""
        return self._canary.is_alive if self._canary else self._survived

    def get(self, name: str) -> bytes | None:
        """What was last stored under a name, by this process or an earlier one."""
        return self._contents.get(name)

    def put(self, name: str, content: bytes) -> None:
        """Store bytes under a name, replacing the previous ones."""
        if len(content) > SIZE_MAX:
            raise ValueError(f"{len(content)} bytes are too many: at most {SIZE_MAX} are kept")
        if content != self._contents.get(name):
            self._contents[name] = content
            if self._notifier.listening:
                self._missing[name] = content
                self.retry()

    @property
    def missing(self) -> bool:
        """Whether something could not be sent yet."""
        return bool(self._missing)

    def retry(self) -> None:
        """Send what is missing."""
        send_in_turn(self._missing, self._send)

    def close(self) -> None:
        """Close this process's descriptors; those in the store stay there."""
        self.channel.send_end.close()
        self.channel.receive_end.close()
        if self._canary:
            self._canary.close()

    def _send(self, name: str, content: bytes) -> bool:
        if name == channel.SEND_END:
            return self._notifier.store_descriptor(name, self.channel.send_end.fileno())
        if name == channel.RECEIVE_END:
            return self._notifier.store_descriptor(name, self.channel.receive_end.fileno())
        return self._send_canary() if name == CANARY else self._replace(name, content)

    def _send_canary(self) -> bool:
        try:
            self._canary = canary(self._notifier)
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("cannot tell whether a store exists: %s%s", error, remedy(error))
        return self._canary is not None

    def _replace(self, name: str, content: bytes) -> bool:
        """Replace what is stored. If no memfd can be written, give up: the previous content
        remains there."""
        try:
            return self._notifier.replace_stored(name, content)
        except OSError as error:
            log.warning("cannot store %s: %s%s", name, error, remedy(error))
            return True

    def _read(self, name: str, fd: int) -> None:
        """Read what is stored under a name, or remove it if it cannot be used."""
        with contextlib.suppress(OSError, ValueError):
            self._contents[name] = read_sealed(fd, SIZE_MAX)
        os.close(fd)
        if name not in self._contents and name != CANARY:
            log.warning("closing the stored descriptor %s, which cannot be used", name)
            self._notifier.remove_descriptor(name)
