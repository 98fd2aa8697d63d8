"""Handovers leave no worker with many more connections than another, however often they happen."""

import os
import re
import signal
from collections.abc import Sequence

import pytest

from integration.client import Client
from integration.daemon import Daemon
from integration.processes import PROC, descriptors, state, stopped
from integration.service import Service
from outlive.channel import BATCH, SEND_END
from tcpupperd.processes.connection_format import Connection, send
from waiting import until

pytestmark = pytest.mark.usefixtures("many_in_flight")

#: How many times the connections of the idlest worker the busiest one may have.
UNEVEN = 1.3

ESTABLISHED = "01"


def connections(daemon: Daemon, service: Service) -> dict[int, int]:
    """How many connections each worker has."""
    local = rf"\w+:{service.listener.getsockname()[1]:04X}"
    rows = (PROC / "net/tcp").read_text()
    found = re.findall(rf"^ *\d+: {local} \S+ {ESTABLISHED}(?: +\S+){{5}} +(\d+) ", rows, re.M)
    ours = {f"socket:[{inode}]" for inode in found}
    return {
        pid: sum(target in ours for target in descriptors(pid).values())
        for pid in daemon.workers()
    }


def are_even(daemon: Daemon, service: Service, workers: int, total: int) -> None:
    """Wait until the workers have all connections, and each has its share."""

    def is_even() -> bool:
        counts = list(connections(daemon, service).values())
        is_complete = len(counts) == workers and sum(counts) == total
        return is_complete and max(counts) <= UNEVEN * min(counts)

    until(is_even)


def are_served(clients: Sequence[Client]) -> None:
    for client in clients:
        client.send(b"x\n")
    assert all(client.read_line() == b"X\n" for client in clients)


@pytest.mark.parametrize(("workers", "total"), [(4, 1000), (2, 100)])
def test_connections_are_even_after_reloads_and_restarts(
    service: Service, workers: int, total: int
) -> None:
    with service.daemon(workers=workers) as daemon:
        clients = [service.connect() for _ in range(total)]
        are_served(clients)
        for _ in range(3):
            daemon.reload()
            are_even(daemon, service, workers, total)
    for _ in range(3):
        with service.daemon(workers=workers) as daemon:
            are_even(daemon, service, workers, total)
            daemon.reload()
            are_even(daemon, service, workers, total)
    with service.daemon(workers=workers):
        are_served(clients)


def test_connections_are_even_when_the_number_of_workers_changes(service: Service) -> None:
    """Those of one worker come to four, at a reload and at a restart, and back."""
    total = 300
    with service.daemon(workers=1) as daemon:
        clients = [service.connect() for _ in range(total)]
        are_served(clients)
        for workers in (4, 2, 1):
            daemon.reload(workers=workers)
            are_even(daemon, service, workers, total)
    for workers in (3, 2, 4):
        with service.daemon(workers=workers) as daemon:
            are_even(daemon, service, workers, total)
    with service.daemon():
        are_served(clients)


def test_restarts_in_quick_succession_leave_them_even(service: Service) -> None:
    total = 400
    with service.daemon():
        clients = [service.connect() for _ in range(total)]
        are_served(clients)
    for _ in range(5):
        with service.daemon():
            pass
    with service.daemon(workers=3) as daemon:
        are_even(daemon, service, 3, total)
        are_served(clients)


def test_large_messages_of_an_older_version_are_dealt_out(service: Service) -> None:
    """0.1.0 puts as many connections into a message as go in."""
    with service.daemon(workers=4) as daemon:
        pass
    clients = [service.connect() for _ in range(4 * BATCH)]
    given = [Connection(*service.listener.accept()) for _ in clients]
    for start in range(0, len(given), BATCH):
        send(service.manager.stored[SEND_END], given[start : start + BATCH])
    for connection in given:
        connection.socket.close()
    with service.daemon(workers=4) as daemon:
        are_even(daemon, service, 4, len(clients))
        are_served(clients)


def test_a_worker_that_hangs_does_not_keep_connections_waiting(service: Service) -> None:
    """Others do not leave the channel to it for ever."""
    with service.daemon(workers=3) as daemon:
        hanging, *others = daemon.workers()
        with stopped(hanging):
            with stopped(*others):
                clients = [service.connect() for _ in range(60)]
                for _ in clients:
                    request, address = service.listener.accept()
                    with request:
                        send(service.manager.stored[SEND_END], [Connection(request, address)])
            are_served(clients)


def test_replaced_worker_comes_to_its_share_of_new_connections(service: Service) -> None:
    with service.daemon(workers=4, greeting="{worker}") as daemon:

        def connect() -> int:
            """Connect a client, while all workers wait for one, so that it does not depend on
            which process the machine runs first; the worker that has it."""
            until(lambda: all(state(pid) == "S" for pid in daemon.workers()))
            return int(service.connect().read_line())

        for _ in range(100):
            connect()
        dead, *others = daemon.workers()
        os.kill(dead, signal.SIGKILL)
        (new,) = set(daemon.wait_for_workers(4, without=dead)) - set(others)
        until(lambda: connect() == new)  # it accepts now
        assert sum(connect() == new for _ in range(512)) >= 512 / 4 / UNEVEN
