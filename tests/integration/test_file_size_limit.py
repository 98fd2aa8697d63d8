"""A limit on the size of files (LimitFSIZE=, `ulimit -f`) that lets no memfd be written."""

import signal

import pytest

from integration.daemon import Daemon
from integration.processes import is_running
from integration.service import Service
from waiting import until

#: Sets the limit, and has another process write the log, which is a file. That process ends with
#: the daemon; without a mark in its environment, it is not taken for one of it.
LIMITED = ["bash", "-c", 'exec prlimit --fsize=0 "$@" 2> >(exec env -i cat >&2)', "bash"]


def limited(service: Service) -> Daemon:
    return service.daemon(wrapper=LIMITED)


@pytest.mark.parametrize("how", [signal.SIGUSR2, signal.SIGKILL])
@pytest.mark.usefixtures("many_in_flight")
def test_connections_outlive_a_restart(service: Service, how: signal.Signals) -> None:
    with limited(service) as daemon:
        clients = [service.connect() for _ in range(300)]
        for client in clients:
            assert client.ask(b"one") == b"ONE"
            client.send(b"half a ")
        slow = service.connect(4096)
        unread = daemon.clog(slow)
        workers = daemon.workers()
        daemon.send_signal(how)
        assert daemon.wait() == min(0, -how * (how == signal.SIGKILL))
        until(lambda: not any(map(is_running, workers)))
    with limited(service):
        assert [client.ask(b"line") for client in clients] == [b"HALF A LINE"] * 300
        slow.end()
        assert slow.read_to_end() == unread.upper()


@pytest.mark.usefixtures("many_in_flight")
def test_connections_outlive_a_reload(service: Service) -> None:
    with limited(service) as daemon:
        clients = [service.connect() for _ in range(300)]
        for client in clients:
            client.send(b"half a ")
        daemon.reload()
        assert [client.ask(b"line") for client in clients] == [b"HALF A LINE"] * 300


def test_what_does_not_work_is_told_once(service: Service) -> None:
    with limited(service) as daemon:
        until(lambda: "last good configuration is not stored" in service.manager.status)
        for what in ("cannot store last-good-configuration", "counters of the supervisor"):
            until(lambda: daemon.log.count(what) == 1)  # noqa: B023
        assert "File too large (raise RLIMIT_FSIZE: LimitFSIZE= in the unit)" in daemon.log
        assert "bug" not in daemon.log
    with service.daemon():
        until(lambda: "not stored" not in service.manager.status)


def test_state_that_fits_nowhere_costs_only_its_own_connection(service: Service) -> None:
    """It is answered, as far as it has complete lines, and closed."""
    with service.daemon(wrapper=LIMITED, max_line=2**24) as daemon:
        clients = [service.connect() for _ in range(20)]
        for client in clients:
            assert client.ask(b"one") == b"ONE"
        long = clients.pop(7)
        long.send(b"two\n" + b"x" * 2**23)
        assert long.read_line() == b"TWO\n"
        until(lambda: daemon.counters()["received_bytes"] > 2**23)
        daemon.send_signal(signal.SIGUSR2)
        assert long.read_to_end() == b""
        long.close()
        assert daemon.wait() == 0
        until(lambda: "closing 1 connection that cannot be handed over" in daemon.log)
        assert "LimitFSIZE=" in daemon.log
    with limited(service):
        assert [client.ask(b"two") for client in clients] == [b"TWO"] * 19
