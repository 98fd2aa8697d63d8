"""More clients than a worker has descriptors for."""

import resource
import select
import time

import pytest

from integration.client import Client
from integration.daemon import Daemon
from integration.measures import cpu_share, scaled
from integration.processes import descriptors
from waiting import DEADLINE, until

pytestmark = pytest.mark.usefixtures("small_limit")

LIMIT = 64
TOO_MANY = 100

#: Seconds between warnings that clients can cause.
QUIET = 10


def short_daemon() -> Daemon:
    return Daemon(workers=1, wrapper=("prlimit", f"--nofile={LIMIT}"))


def fill(daemon: Daemon) -> list[Client]:
    """Connect until the worker can take no more; those served."""
    served = []
    while "not accepting connections" not in daemon.log:
        served.append(daemon.connect())
        assert served[-1].ask(b"first") == b"FIRST"
    return served


def use_up_descriptors(daemon: Daemon) -> None:
    """Leave the worker two more than it has."""
    (worker,) = daemon.workers()
    limit = max(descriptors(worker)) + 3
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (limit, limit))


def test_no_free_descriptors() -> None:
    with Daemon(workers=1) as daemon:
        served = [daemon.connect() for _ in range(10)]
        assert [client.ask(b"first") for client in served] == [b"FIRST"] * 10
        use_up_descriptors(daemon)
        served += [daemon.connect() for _ in range(2)]
        check_shortage(daemon, served)
        assert "not accepting connections: Too many open files" in daemon.log


def test_no_room_within_the_limit_of_descriptors() -> None:
    with short_daemon() as daemon:
        check_shortage(daemon, fill(daemon))


def check_shortage(daemon: Daemon, served: list[Client]) -> None:
    waiting = [daemon.connect() for _ in range(TOO_MANY)]
    until(lambda: cpu_share(daemon.workers(), scaled(1.0, 30.0)) < 0.02)
    assert [client.ask(b"again") for client in served] == [b"AGAIN"] * len(served)

    for client in waiting:
        client.send(b"at last\n")
        served.pop(0).close()
        assert client.read_line() == b"AT LAST\n"
        served.append(client)

    assert daemon.log.count("not accepting connections") == 1
    for client in served[:5]:
        client.close()
    assert daemon.connect().ask(b"more") == b"MORE"
    until(lambda: "accepting connections again" in daemon.log)
    assert daemon.log.count("not accepting connections") == 1
    assert daemon.counters()["accept_pauses"] == 1


def test_shortages_in_a_row_do_not_flood_the_log() -> None:
    with short_daemon() as daemon:
        served = fill(daemon)
        began = time.monotonic()
        episodes = scaled(50, 2000)
        for _ in range(episodes):
            for client in served[:2]:
                client.close()
            served[:2] = [daemon.connect(), daemon.connect()]
            assert [client.ask(b"in") for client in served[:2]] == [b"IN", b"IN"]
        told = 1 + (time.monotonic() - began) // QUIET
        assert daemon.log.count("not accepting connections") <= told
        assert daemon.log.count("accepting connections again") <= told


def test_no_connection_is_lost_in_a_reload_without_descriptors() -> None:
    with short_daemon() as daemon:
        served = fill(daemon)
        waiting = [daemon.connect() for _ in range(5)]
        daemon.reload(max_line=1000)
        assert [client.ask(b"after") for client in served] == [b"AFTER"] * len(served)
        for client in waiting:
            client.send(b"at last\n")
            served.pop().close()
        assert [client.read_line() for client in waiting] == [b"AT LAST\n"] * 5


def test_no_connection_is_lost_if_fewer_workers_lack_room_for_all() -> None:
    """Those wait in the channel, until others end."""
    with Daemon(workers=2, wrapper=("prlimit", f"--nofile={LIMIT}")) as daemon:
        clients: list[Client] = []

        def all_are_full() -> bool:
            clients.append(daemon.connect())
            return daemon.log.count("not accepting connections") == 2

        until(all_are_full)
        taken = daemon.counters()["open"]
        daemon.reload(workers=1)
        for client in clients:
            client.send(b"after\n")
        until(lambda: daemon.counters()["handed_over_out"] >= taken)
        while clients:
            ready, _, _ = select.select([one.socket for one in clients], [], [], DEADLINE)
            assert ready, f"{len(clients)} clients wait in vain"
            for client in [one for one in clients if one.socket in ready]:
                assert client.read_line() == b"AFTER\n"
                clients.remove(client)
                client.close()
