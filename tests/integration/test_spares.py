"""Spare listeners: the store has them for the case that the socket unit lets go of its own."""

import os
import signal
import socket
from io import FileIO
from typing import Any

import pytest

from integration.client import name_of
from integration.daemon import Daemon
from integration.processes import descriptors
from integration.service import Service
from waiting import until

UNIT = "tcpupperd.socket"
BOTH = f"systemctl restart {UNIT} tcpupperd.service"
SPARE = "listener-upper"


class Unit:
    """A service whose addresses are those of a socket unit, which may change."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.passed: list[tuple[str, socket.socket]] = [(UNIT, service.listener)]

    def daemon(self, unit: str = UNIT, **settings: Any) -> Daemon:
        manager = self.service.manager
        passed = [*self.passed, *manager.stored.items(), *manager.listeners]
        wrapper = ("env", f"TCPUPPERD_SOCKET_UNIT={unit}") if unit else ()
        daemon = Daemon(manager=manager, passed=passed, wrapper=wrapper, **settings)
        daemon.ended_by = signal.SIGUSR2
        return daemon

    @property
    def stored(self) -> list[str]:
        """The names of the spare listeners."""
        return [name for name, _ in self.service.manager.listeners]


@pytest.fixture
def unit(service: Service) -> Unit:
    service.manager.room = 100
    return Unit(service)


def open_files(pid: int, one: socket.socket) -> int:
    """How many descriptors of a process are this socket."""
    inode = f"socket:[{os.fstat(one.fileno()).st_ino}]"
    return list(descriptors(pid).values()).count(inode)


def test_spare_serves_the_address_that_the_unit_no_longer_has(unit: Unit) -> None:
    with unit.daemon() as daemon:
        client = unit.service.connect()
        assert client.ask(b"one") == b"ONE"
        until(lambda: unit.stored == [SPARE])
        assert "systemctl" not in unit.service.manager.status
    unit.passed = []
    for line in (b"two", b"three"):
        with unit.daemon() as daemon:
            assert daemon.addresses == [unit.service.address]
            assert client.ask(line) == line.upper()
            assert unit.service.connect().ask(b"new") == b"NEW"
            until(lambda: f"{UNIT} was changed: {BOTH}" in unit.service.manager.status)
            until(lambda: f"{UNIT} was changed: {BOTH}" in daemon.log)
            until(lambda: unit.stored == [SPARE])
    unit.passed = [(UNIT, unit.service.listener)]
    with unit.daemon():
        until(lambda: "systemctl" not in unit.service.manager.status)


def test_spare_that_is_not_needed_is_closed(unit: Unit) -> None:
    with unit.daemon():
        until(lambda: unit.stored == [SPARE])
    with unit.daemon() as daemon:
        for pid in (daemon.pid, *daemon.workers()):
            assert open_files(pid, unit.service.listener) == 1
        until(lambda: unit.stored == [SPARE])


def test_spares_keep_their_services(unit: Unit) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        socket.create_server(("127.0.0.1", 0)) as metrics,
    ):
        unit.passed += [(UNIT, other), ("metrics", metrics)]
        with unit.daemon():
            until(lambda: sorted(unit.stored) == ["listener-metrics", SPARE, SPARE])
        unit.passed = unit.passed[1:2]
        with unit.daemon() as daemon:
            wanted = [name_of(other), unit.service.address, f"metrics={name_of(metrics)}"]
            assert sorted(daemon.addresses) == sorted(wanted)
            remedy = f"{UNIT} was changed: {BOTH}"
            until(lambda: remedy in unit.service.manager.status)


def test_without_listeners_live_connections_are_served(unit: Unit) -> None:
    with unit.daemon():
        client = unit.service.connect()
        assert client.ask(b"one") == b"ONE"
        until(lambda: unit.stored == [SPARE])
    unit.passed = []
    unit.service.manager.forget(SPARE)
    with unit.daemon() as daemon:
        workers = daemon.workers()
        assert client.ask(b"two") == b"TWO"
        client.close()  # a worker without connections waits for those of the channel
        until(lambda: daemon.counters()["open"] == 0)
        remedy = f"{UNIT} was changed or has failed: {BOTH}"
        until(lambda: remedy in unit.service.manager.status)
        assert daemon.workers() == workers
        daemon.reload()
        until(lambda: "listening on no address" in daemon.log)


def test_without_listeners_and_connections_it_does_not_start(unit: Unit) -> None:
    """So that it is tried again, and begins once the socket unit has its address."""
    with unit.service.listener:
        unit.passed = []
        status, log = unit.daemon(listen=["127.0.0.1:0"]).run()
    assert status == 71
    assert f"no sockets were passed in: {UNIT} was changed or has failed: {BOTH}" in log


def test_names_of_an_instance(unit: Unit) -> None:
    unit.passed.append(("proxy", unit.passed.pop()[1]))
    with unit.daemon("tcpupperd@7.socket"):
        until(lambda: unit.stored == ["listener-proxy"])
    unit.passed = []
    with unit.daemon("tcpupperd@7.socket"):
        restart = "systemctl restart tcpupperd@7.socket tcpupperd@7.service"
        remedy = f"a socket unit was changed: {restart}"
        until(lambda: remedy in unit.service.manager.status)


def test_nothing_is_spared_without_a_socket_unit(unit: Unit) -> None:
    with unit.daemon():
        until(lambda: unit.stored == [SPARE])
    with unit.daemon(""):
        until(lambda: unit.stored == [])


def test_what_is_no_listener_is_dropped(unit: Unit) -> None:
    strays: list[Any] = [FileIO(os.memfd_create("next")), socket.socket()]
    unit.service.manager.listeners += [(SPARE, one) for one in strays]
    with unit.daemon() as daemon:
        assert daemon.addresses == [unit.service.address]
        until(lambda: len(unit.stored) == 1)
