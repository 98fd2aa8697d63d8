"""A small limit of descriptors: no connection is accepted that a restart could not hand over."""

import select
import signal
import socket

import pytest

from integration.client import Client
from integration.daemon import Daemon
from integration.descriptor_limit import limited
from integration.processes import is_running, stopped
from integration.service import Service
from tcpupperd.processes.worker import SETTLE_INTERVAL
from tcpupperd.serving.acceptor import PRIVILEGED_EXTRA
from waiting import DEADLINE, until

pytestmark = pytest.mark.usefixtures("small_limit")

LIMIT = 256
WORKERS = 4

#: What all workers may have: less a sixteenth for messages, and for each worker one for its last
#: message and those accepted beyond its capacity.
TOTAL = (LIMIT - LIMIT // 16 - WORKERS * (1 + PRIVILEGED_EXTRA)) // WORKERS * WORKERS


def small(service: Service) -> Daemon:
    """A daemon with the limit."""
    return service.daemon(wrapper=limited(LIMIT), workers=WORKERS)


def fill(service: Service, daemon: Daemon) -> list[Client]:
    """Connect more clients than are accepted; those that are."""
    clients = [service.connect() for _ in range(2 * LIMIT)]
    for client in clients:
        client.send(b"x\n")
    until(lambda: is_full(daemon, TOTAL))
    served = [client for client in clients if is_answered(client)]
    assert len(served) == TOTAL
    return served


def is_full(daemon: Daemon, count: int) -> bool:
    """Whether it has so many connections, and has answered one line of each."""
    counters = daemon.counters()
    return counters["open"] == counters["lines"] == count


def is_answered(client: Client) -> bool:
    client.socket.setblocking(False)
    try:
        return client.socket.recv(10) == b"X\n"
    except BlockingIOError:
        return False
    finally:
        client.socket.settimeout(DEADLINE)


def restart_loses_nobody(daemon: Daemon) -> None:
    daemon.stop(signal.SIGUSR2)
    assert "cannot be handed over" not in daemon.log


def test_the_limit_that_binds_is_logged(service: Service) -> None:
    with small(service) as daemon:
        until(lambda: f"a limit of {LIMIT} descriptors (RLIMIT_NOFILE" in daemon.log)


def test_a_restart_hands_over_all_that_was_accepted(service: Service) -> None:
    with small(service) as daemon:
        served = fill(service, daemon)
        restart_loses_nobody(daemon)
    for _ in range(2):
        with small(service) as daemon:
            assert all(client.ask(b"y") == b"Y" for client in served)
            restart_loses_nobody(daemon)


def test_a_reload_does_not_let_in_more(service: Service) -> None:
    """The new workers accept before the old ones have given."""
    with small(service) as daemon:
        served = fill(service, daemon)
        for _ in range(3):
            daemon.reload()
            assert all(client.ask(b"y") == b"Y" for client in served)
            assert daemon.counters()["open"] <= TOTAL
        restart_loses_nobody(daemon)
    with small(service) as daemon:
        assert all(client.ask(b"y") == b"Y" for client in served)


def test_new_workers_accept_nobody_before_the_old_ones_have_left(service: Service) -> None:
    """Otherwise each would have to know what the others are accepting at the same moment."""
    with small(service) as daemon:
        served = service.connect()
        assert served.ask(b"x") == b"X"
        (late,) = [pid for pid in daemon.workers() if pid == daemon.worker_of(served)]
        with stopped(late):
            daemon.send_signal(signal.SIGHUP)
            until(lambda: "reloaded: " in daemon.log)
            until(lambda: len(daemon.workers()) == WORKERS + 1)
            new = service.connect()
            new.send(b"y\n")
            # Long enough for each of them to look several times: see SETTLE_INTERVAL.
            assert not select.select([new.socket], [], [], 10 * SETTLE_INTERVAL)[0]
        assert new.read_line() == b"Y\n"
        assert served.ask(b"z") == b"Z"
        restart_loses_nobody(daemon)


def test_restarts_in_a_row_keep_no_new_client_waiting(service: Service) -> None:
    """A process says that it is ready once it has taken over all connections and accepted some of
    the clients that wait, so each restart serves them, even if the next one follows
    immediately."""
    with small(service) as daemon:
        served = [service.connect() for _ in range(TOTAL - 40)]
        assert {client.ask(b"x") for client in served} == {b"X"}
    for _ in range(5):
        new = service.connect()
        new.send(b"x\n")
        with small(service) as daemon:
            restart_loses_nobody(daemon)
        assert new.read_line() == b"X\n"  # while no process runs
        served.append(new)
    with small(service):
        assert all(client.ask(b"y") == b"Y" for client in served)


def test_a_reload_without_a_store_loses_no_connection() -> None:
    """Nor may there be more than the new workers have room for: the old ones would wait."""
    with Daemon(wrapper=limited(LIMIT), workers=WORKERS) as daemon:
        clients = [daemon.connect() for _ in range(3 * LIMIT)]
        for client in clients:
            client.send(b"x\n")
        room = WORKERS * (LIMIT - LIMIT // 4 - LIMIT // 4)
        until(lambda: is_full(daemon, room))
        served = [client for client in clients if is_answered(client)]
        for _ in range(2):
            daemon.reload()
            daemon.wait_for_workers(WORKERS)
            assert all(client.ask(b"y") == b"Y" for client in served)
        assert "killing" not in daemon.log


def test_those_that_wait_are_accepted_when_there_is_room(service: Service) -> None:
    with small(service) as daemon:
        served = fill(service, daemon)
    with small(service) as daemon:
        assert all(client.ask(b"y") == b"Y" for client in served)
        for client in served:
            client.close()
        waiting = [client for client in service.clients if client not in served]
        for client in waiting[:TOTAL]:
            assert client.read_line() == b"X\n"


def test_killed_supervisor_loses_no_connection_either(service: Service) -> None:
    with small(service) as daemon:
        served = fill(service, daemon)
        workers = daemon.workers()
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        until(lambda: not any(map(is_running, workers)))
    with small(service):
        assert all(client.ask(b"y") == b"Y" for client in served)


@pytest.mark.parametrize(("before", "after", "count"), [(300, 120, 187), (2048, 512, 750)])
def test_limit_that_was_lowered_costs_no_more_than_it_must(
    service: Service, before: int, after: int, count: int
) -> None:
    """While more connections are in the channel than the new limit allows to be in flight, nothing
    can be stored. That must not be taken for a store that keeps nothing."""
    with service.daemon(wrapper=limited(before)) as daemon:
        clients = [service.connect() for _ in range(count)]
        for client in clients:
            assert client.ask(b"x") == b"X"
        restart_loses_nobody(daemon)
    with service.daemon(wrapper=limited(after)) as daemon:
        assert all(client.ask(b"y") == b"Y" for client in clients)
        until(lambda: "canary" in service.manager.stored)
        until(lambda: "a restart can hand over only about" in daemon.log)
        assert "cannot send FDSTORE=1" in daemon.log
        assert "LimitNOFILE= in the unit" in daemon.log
        assert "does not keep" not in daemon.log
        daemon.send_signal(signal.SIGUSR2)
        until(lambda: "that cannot be handed over" in daemon.log)
        for client in clients:
            client.socket.shutdown(socket.SHUT_WR)
        assert daemon.wait() == 0
    with service.daemon(wrapper=limited(before)) as daemon:
        until(lambda: daemon.counters()["handed_over_in"] >= 0.8 * after)
        assert all(client.read_to_end() == b"" for client in clients)
