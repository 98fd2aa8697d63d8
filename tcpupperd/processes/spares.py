"""Spare listeners: copies of the listening sockets in the service manager's store.

When a socket unit is changed (systemctl edit, systemctl daemon-reload), systemd closes its copies
of the listeners on addresses that the unit no longer has. It opens those on new addresses only
when the unit is restarted. Until then, only the service has the listeners on the previous
addresses, and a restart of the service would close them. The next process therefore takes them out
of the store, keeps serving the previous addresses, and says which command to run.

A spare listener keeps its address in use, so it must not outlive its socket unit. A command of the
service unit removes it when the socket unit is stopped or restarted (systemd/release-listeners).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable

from outlive.activation import can_listen
from outlive.notify import Notifier
from tcpupperd.address import SERVICES, UPPER
from tcpupperd.events import Event
from tcpupperd.host.sockets import Listener, ListenError
from tcpupperd.words import written

log = logging.getLogger(__name__)

#: By name in the store: the service of a listener.
NAMES = {f"listener-{service}": service for service in SERVICES}

#: The name of the spare listeners of the main socket unit.
MAIN = f"listener-{UPPER}"


class Spares:
    """The spare listeners of a daemon whose addresses are those of a socket unit."""

    def __init__(self, stored: Iterable[tuple[str, int]], notifier: Notifier, unit: str) -> None:
        """Use what was `stored`, by name and descriptor. `unit` is the socket unit, "" if there is
        none; then nothing is stored."""
        self._notifier = notifier
        self._unit = unit
        stored = list(stored)
        self._names = {name for name, _ in stored}
        self._stored = [one for name, fd in stored if (one := _listener(name, fd))]
        self._to_store: list[Listener] = []
        self.remedy = ""  # the command to run, for the status line, if socket units were changed

    def complete(self, passed: list[Listener], *, connections: bool) -> list[Listener]:
        """The listeners to serve: those that were passed in, and those that are only in the store.
        Raises ListenError if there are none, unless there may be `connections` to serve."""
        have = {_address(one) for one in passed}
        spare = [one for one in self._stored if self._unit and _address(one) not in have]
        for one in self._stored:
            if one not in spare:  # left open, it would get a share of the clients
                one.socket.close()
        if spare or (self._unit and not passed):
            self._set_remedy(spare)
        if self._unit and not passed and not spare and not connections:
            raise ListenError(f"no sockets were passed in: {self.remedy}")
        return passed + spare

    def keep(self, listeners: Iterable[Listener]) -> None:
        """Store the listeners of a daemon that is ready, replacing what was stored."""
        for name in self._names:
            self._notifier.remove_descriptor(name)
        if self._unit:
            self._to_store = list(listeners)
        self.store_rest()
        if self.remedy:
            log.warning("%s", self.remedy, extra=Event.SOCKET_CHANGED.fields())

    @property
    def missing(self) -> bool:
        """Whether some could not be stored yet."""
        return bool(self._to_store)

    def store_rest(self) -> None:
        """Store what could not be stored before, because too many descriptors were in flight."""
        self._to_store = [
            one
            for one in self._to_store
            if not self._notifier.store_descriptor(_name(one), one.socket.fileno())
        ]

    def _set_remedy(self, spare: list[Listener]) -> None:
        """One command is right for all socket units: the others are part of the main one."""
        if not spare:
            what = f"{self._unit} was changed or has failed"
        elif any(_name(one) == MAIN for one in spare):
            what = f"{self._unit} was changed"
        else:
            what = "a socket unit was changed"
        service = self._unit.replace(".socket", ".service")
        self.remedy = f"{what}: systemctl restart {self._unit} {service}"


def _listener(name: str, fd: int) -> Listener | None:
    """What is stored under a name; None if it is not a listener that can be served."""
    try:
        one = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None
    if can_listen(one):
        return Listener(one, NAMES[name])
    one.close()
    return None


def _name(one: Listener) -> str:
    return f"listener-{one.name}" if one.name in SERVICES else MAIN


def _address(one: Listener) -> str:
    return written(one.socket.getsockname())
