"""Restarts under a service manager that keeps descriptors: no connection notices.

The test is the service manager: it holds the listening socket, keeps the descriptors that it
receives with FDSTORE=1 (FileDescriptorStoreMax= in systemd.service(5)), and passes all of them to
the next daemon.
"""

import os
import signal
import socket
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest

from integration.daemon import ROOT, Daemon
from integration.manager import Manager
from integration.processes import is_running, stopped
from integration.service import Service
from outlive.channel import RECEIVE_END, SEND_END
from outlive.memfd import read_sealed, sealed
from tcpupperd.config_file import FILE_SIZE_MAX
from tcpupperd.processes.connection_format import Connection, send
from tcpupperd.processes.store import CONFIGURATION, NAMES
from waiting import until

MANY = 2000

#: Makes the supervisor fail; Python imports it as its sitecustomize.
FAILS_AT_SIGUSR1 = """
from tcpupperd.processes.supervisor import Supervisor

def fail(self):
    raise RuntimeError("from the test")

Supervisor._log_counters = fail
"""


def test_channel_is_stored_once(service: Service) -> None:
    with service.daemon():
        until(lambda: service.manager.stored.keys() == NAMES)
    with service.daemon() as daemon:
        daemon.reload()
    for name in (SEND_END, RECEIVE_END):
        stores = [one for one in service.manager.messages if f"FDNAME={name}" in one.lines]
        assert len(stores) == 1
        assert {"FDSTORE=1", "FDPOLL=0"} <= set(stores[0].lines)


def test_connections_continue_in_the_next_daemon_in_any_state(service: Service) -> None:
    with service.daemon() as daemon:
        idle, half, ended = service.connect(), service.connect(), service.connect()
        assert idle.ask(b"one") == b"ONE"
        assert half.ask(b"one") == b"ONE"
        half.send(b"half a ")
        slow, closing = service.connect(4096), service.connect(4096)
        unread = {client: daemon.clog(client) for client in (slow, closing)}
        closing.end()
        ended.send(b"last")
        ended.end()
    queued = service.connect()
    queued.send(b"queued\n")
    with service.daemon():
        assert idle.ask(b"two") == b"TWO"
        assert half.ask(b"line") == b"HALF A LINE"
        assert ended.read_to_end() == b"LAST"
        assert queued.read_line() == b"QUEUED\n"
        slow.end()
        for client, data in unread.items():
            assert client.read_to_end() == data.upper()


def test_lines_continue_to_be_counted(service: Service) -> None:
    with service.daemon(lines_per_connection=3):
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
    with service.daemon(lines_per_connection=3):
        assert client.ask(b"two") == b"TWO"
    with service.daemon(lines_per_connection=3):
        client.send(b"three\nfour\n")
        assert client.read_to_end() == b"THREE\n"


def test_channel_that_was_shut_down_is_replaced_while_it_runs(service: Service) -> None:
    """As an attacker in a worker can do, who has the same sockets as everybody."""
    with service.daemon(workers=3) as daemon:
        clients = [service.connect() for _ in range(20)]
        for client in clients:
            assert client.ask(b"one") == b"ONE"
        before = service.manager.stored[RECEIVE_END]
        before.shutdown(socket.SHUT_RD)
        until(lambda: service.manager.stored.get(RECEIVE_END, before) is not before)
        until(lambda: "using a new one" in daemon.log)
        daemon.reload()
        for client in clients:
            assert client.ask(b"two") == b"TWO"
        assert daemon.log.count("channel") == 1
    with service.daemon() as daemon:
        for client in clients:
            assert client.ask(b"three") == b"THREE"
        assert daemon.counters()["handed_over_in"] == len(clients)


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_channel_that_is_shut_down_just_before_a_restart_is_replaced(
    service: Service, how: int
) -> None:
    """At one end: what it can no longer send, the other can no longer receive."""
    with service.daemon() as daemon:
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        until(lambda: service.manager.stored.keys() == NAMES)
        with stopped(*daemon.workers()):
            service.manager.stored[SEND_END].shutdown(how)
            daemon.send_signal(signal.SIGUSR2)
            until(lambda: "handing over" in daemon.log)
    with service.daemon():
        assert client.ask(b"two") == b"TWO"


def test_channel_that_was_shut_down_in_between_is_replaced(service: Service) -> None:
    with service.daemon():
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
    service.manager.stored[RECEIVE_END].shutdown(socket.SHUT_RDWR)
    with service.daemon() as daemon:
        assert client.ask(b"two") == b"TWO"
        assert "the stored handover channel does not work" in daemon.log
    with service.daemon() as daemon:
        assert client.ask(b"three") == b"THREE"
        assert "does not work" not in daemon.log


def test_line_that_is_longer_than_a_new_limit_is_not_lost(service: Service) -> None:
    """What a connection may hold follows from the configuration under which it was served."""
    begun = b"x" * 2**20
    with service.daemon(max_line=2**21) as daemon:
        clients = [service.connect() for _ in range(2)]
        for client in clients:
            client.send(begun)
        until(lambda: daemon.counters()["received_bytes"] == 2 * len(begun))
    with service.daemon(max_line=10) as daemon:
        assert clients[0].read(len(begun)) == begun.upper()
        clients[0].send(b"end\n")
        assert clients[0].read_line() == b"END\n"
        daemon.reload(max_line=2**22)
        clients[0].send(begun)
        until(lambda: daemon.counters()["received_bytes"] == len(begun) + 4)
        daemon.reload(max_line=10)
        assert clients[0].read(len(begun)) == begun.upper()
        assert daemon.counters()["state_unreadable"] == 0


def test_connections_outlive_a_killed_supervisor(service: Service) -> None:
    with service.daemon() as daemon:
        half, slow = service.connect(), service.connect(4096)
        half.send(b"half a ")
        unread = daemon.clog(slow)
        workers = daemon.workers()
        daemon.send_signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        until(lambda: not any(map(is_running, workers)))
    with service.daemon():
        assert half.ask(b"line") == b"HALF A LINE"
        slow.end()
        assert slow.read_to_end() == unread.upper()


def test_connections_outlive_an_exception_in_the_supervisor(
    service: Service, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILS_AT_SIGUSR1)
    with service.daemon(wrapper=("env", f"PYTHONPATH={tmp_path}:{ROOT}")) as daemon:
        clients = [service.connect() for _ in range(20)]
        for client in clients:
            assert client.ask(b"one") == b"ONE"
            client.send(b"half a ")
        workers = daemon.workers()
        daemon.send_signal(signal.SIGUSR1)
        assert daemon.wait() == 1
        assert "internal error; please report this bug" in daemon.log
        assert "RuntimeError: from the test" in daemon.log
        until(lambda: not any(map(is_running, workers)))
    with service.daemon():
        assert [client.ask(b"line") for client in clients] == [b"HALF A LINE"] * 20


@pytest.mark.usefixtures("many_in_flight")
def test_many_connections_outlive_two_restarts_in_a_row(service: Service) -> None:
    with service.daemon() as daemon:
        clients = [service.connect() for _ in range(MANY)]
        for number, client in enumerate(clients):
            assert client.ask(b"line %d" % number) == b"LINE %d" % number
            client.send(b"%d and " % number)
    with service.daemon():
        pass
    with service.daemon() as daemon:
        for number, client in enumerate(clients):
            assert client.ask(b"more") == b"%d AND MORE" % number
        until(lambda: daemon.counters()["handed_over_in"] == MANY)
        assert daemon.counters()["open"] == MANY


def test_a_start_that_fails_in_between_loses_nothing(service: Service) -> None:
    with service.daemon() as daemon:
        client = service.connect()
        client.send(b"half a ")
        until(lambda: daemon.counters()["open"] == 1)
    status, _ = service.daemon("--workers", "none").run()
    assert status == 2
    service.manager.stored.pop(CONFIGURATION).close()
    status, _ = service.daemon(framing="lines").run()
    assert status == 78
    with service.daemon():
        assert client.ask(b"line") == b"HALF A LINE"


def test_clients_that_left_meanwhile_do_no_harm(service: Service) -> None:
    with service.daemon() as daemon:
        clients = [service.connect() for _ in range(6)]
        for client in clients:
            assert client.ask(b"one") == b"ONE"
    clients[0].close()
    clients[1].reset()
    clients[2].end()
    with service.daemon() as daemon:
        assert [client.ask(b"two") for client in clients[3:]] == [b"TWO"] * 3
        assert clients[2].read_to_end() == b""
        until(lambda: daemon.counters()["open"] == 3)
        assert "Traceback" not in daemon.log


def test_drain_closes_connections_not_taken_over_yet(service: Service) -> None:
    with service.daemon() as daemon:
        with stopped(*daemon.workers()):
            clients = [service.connect() for _ in range(10)]
            for client in clients:
                client.send(b"one\n")
                request, address = service.listener.accept()
                with request:
                    send(service.manager.stored[SEND_END], [Connection(request, address)])
            daemon.send_signal(signal.SIGTERM)
            until(daemon.has_dismissed_workers)
        assert [client.read_to_end() for client in clients] == [b"ONE\n"] * 10
        for client in clients:
            client.close()
        assert daemon.wait() == 0


def test_useless_stored_descriptors_are_closed_and_harm_nothing(service: Service) -> None:
    """As a next version might have left it."""
    with service.daemon() as daemon:
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
    strays = [
        *socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET),
        *socket.socketpair(),  # a stream that could be taken for a connection
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        FileIO(os.memfd_create("next")),
        FileIO(os.open("/dev/null", os.O_RDONLY)),
        FileIO(os.eventfd(1)),
    ]
    service.manager.stored |= {f"next {number}": one for number, one in enumerate(strays)}
    with service.daemon() as daemon:
        until(lambda: service.manager.stored.keys() <= NAMES)
        assert client.ask(b"two") == b"TWO"
        for number in range(len(strays)):
            assert f"closing the stored descriptor next {number}, which cannot be" in daemon.log
        assert daemon.log.count("which cannot be used") == len(strays)


def test_channel_that_is_none_is_replaced(service: Service) -> None:
    memfd = FileIO(os.memfd_create("a memfd"))
    service.manager.stored |= {SEND_END: memfd, RECEIVE_END: socket.socket()}
    with service.daemon() as daemon:
        until(lambda: service.manager.stored.keys() == NAMES)
        until(lambda: service.manager.stored[SEND_END] is not memfd)
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        assert daemon.log.count("which cannot be used") == 2
    with service.daemon():
        assert client.ask(b"two") == b"TWO"


# The last good configuration


def missing(daemon: Daemon) -> None:
    daemon.config.unlink()


def directory(daemon: Daemon) -> None:
    daemon.config.unlink()
    daemon.config.mkdir()


def not_toml(daemon: Daemon) -> None:
    daemon.configure("this is not TOML")


def not_text(daemon: Daemon) -> None:
    daemon.config.write_bytes(b"\xff\xfe")


def unknown(daemon: Daemon) -> None:
    daemon.configure("max_lines = 5\n")


def no_value(daemon: Daemon) -> None:
    daemon.configure(log_level="chatty")


def test_invalid_file_does_not_stop_a_running_service(service: Service) -> None:
    with service.daemon(lines_per_connection=100):
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        client.send(b"half a ")
    # Each restart but the first follows on one that did not make it any better.
    for spoil in (missing, directory, not_toml, not_text, unknown, no_value):
        daemon = service.daemon(lines_per_connection=7)
        spoil(daemon)
        with daemon:
            assert client.ask(b"line") == b"HALF A LINE"
            client.send(b"half a ")
            complaints = [line for line in daemon.log.splitlines() if "ERROR" in line]
            assert str(daemon.config) in complaints[0]
            assert "last good configuration" in complaints[-1]
            until(lambda: "last good configuration" in service.manager.status)
            assert "lines_per_connection = 100\n" in stored(service)
            daemon.send_signal(signal.SIGHUP)
            until(lambda: "reload failed" in daemon.log)  # noqa: B023
            service.manager.wait("READY=1")  # of the end of the reload
            assert "last good configuration" in service.manager.status
            assert client.ask(b"line") == b"HALF A LINE"
            client.send(b"half a ")


def test_trouble_ends_when_the_file_is_mended(service: Service) -> None:
    with service.daemon():
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
    with service.daemon(framing="lines") as daemon:
        until(lambda: "last good" in daemon.manager.status)
        daemon.reload(framing="line", lines_per_connection=50)
        until(lambda: "last good" not in daemon.manager.status)
        until(lambda: "lines_per_connection = 50\n" in stored(service))
        assert client.ask(b"two") == b"TWO"


def test_a_cold_start_with_an_invalid_file_fails(service: Service) -> None:
    assert service.daemon(framing="lines").run()[0] == 78


def test_options_win_over_the_last_good_configuration(service: Service) -> None:
    with service.daemon("--workers=3", idle_timeout=5):
        pass
    with service.daemon("--workers=1", framing="lines") as daemon:
        assert len(daemon.workers()) == 1


def test_a_reload_that_fails_is_not_stored(service: Service) -> None:
    with service.daemon(lines_per_connection=5) as daemon:
        daemon.configure(lines_per_connection=-1)
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "reload failed" in daemon.log)
        assert "lines_per_connection = 5\n" in stored(service)


def not_sealed() -> int:
    fd = os.memfd_create("not sealed", os.MFD_ALLOW_SEALING)
    os.write(fd, b"workers = 1")
    return fd


def not_a_memfd() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def too_large() -> int:
    return sealed(b"#" * (FILE_SIZE_MAX + 1))


def binary() -> int:
    return sealed(b"\xff")


def test_stored_descriptors_with_unknown_names_are_removed(service: Service) -> None:
    """As other versions may have stored them, each with a file or a socket of its own."""
    with service.daemon():
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        until(lambda: service.manager.stored.keys() >= NAMES)
    pair = socket.socketpair()
    service.manager.stored |= {"witness": pair[0], "last-configuration": FileIO(sealed(b""))}
    with service.daemon() as daemon:
        assert client.ask(b"two") == b"TWO"
        until(lambda: service.manager.stored.keys() == NAMES)
        assert daemon.counters()["handed_over_in"] == 1
    pair[1].close()


@pytest.mark.parametrize("make", [not_sealed, not_a_memfd, too_large, binary])
def test_damaged_configuration_is_as_none(service: Service, make: Callable[[], int]) -> None:
    service.manager.stored[CONFIGURATION] = FileIO(make())
    with service.daemon(idle_timeout=9) as daemon:
        assert "the stored configuration cannot be used: " in daemon.log
        until(lambda: "idle_timeout = 9\n" in stored(service))


def test_descriptors_stored_by_another_version_are_used_if_known(service: Service) -> None:
    text = b'lines_per_connection = 2\nnext = 1\nframing = "next"\nlog_level = "debug"\n'
    service.manager.stored[CONFIGURATION] = FileIO(sealed(text))
    with service.daemon(workers="many") as daemon:
        client = service.connect()
        client.send(b"one\ntwo\nthree\n")
        assert client.read_to_end() == b"ONE\nTWO\n"
        assert daemon.log.count("ignoring a stored setting: ") == 2
        assert " DEBUG " in daemon.log


def stored(service: Service) -> str:
    """The configuration that is kept."""
    file = service.manager.stored.get(CONFIGURATION)
    return read_sealed(file.fileno(), FILE_SIZE_MAX).decode() if file else ""


# A store that is none, and orders that follow on each other


def test_store_that_keeps_nothing_is_found_out(service: Service) -> None:
    """As with FDSTORE=8 and FileDescriptorStoreMax=0."""
    service.manager.room = 0
    with service.daemon() as daemon:
        until(lambda: "the service manager does not keep file descriptors" in daemon.log)
        until(lambda: "the descriptor store does not work" in daemon.manager.status)
        client = service.connect()
        client.send(b"one\n")
        assert client.read_line() == b"ONE\n"
        daemon.send_signal(signal.SIGUSR2)
        assert client.read_to_end() == b""
        client.close()
        assert daemon.wait() == 0
        assert "closing 1 connection\n" in daemon.log


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGKILL])
def test_store_that_is_emptied_later_is_found_out(
    service: Service, number: signal.Signals
) -> None:
    """As when a drop-in says FileDescriptorStoreMax=0 from now on."""
    with service.daemon() as daemon:
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        assert "does not keep file descriptors" not in daemon.log
        while service.manager.stored:
            service.manager.stored.popitem()[1].close()
        until(lambda: "the service manager does not keep file descriptors" in daemon.log)
        workers = daemon.workers()
        daemon.send_signal(number)
        assert client.read_to_end() == b""
        client.close()
        daemon.wait()
        until(lambda: not any(map(is_running, workers)))


def test_received_data_is_answered_before_the_connection_is_stored(service: Service) -> None:
    """If a stop follows the restart, nothing else would."""
    with service.daemon() as daemon:
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        with stopped(*daemon.workers()):
            queued = service.connect()
            for one in (client, queued):
                one.send(b"two\n")
            daemon.send_signal(signal.SIGUSR2)
            until(daemon.has_dismissed_workers)
        assert client.read_line() == b"TWO\n"
        assert queued.read_line() == b"TWO\n"


def test_stop_after_a_stop_for_a_restart_closes_kept_connections(service: Service) -> None:
    with service.daemon() as daemon:
        slow = service.connect(4096)
        unread = daemon.clog(slow)
        with stopped(*daemon.workers()):
            daemon.send_signal(signal.SIGUSR2)
            until(daemon.has_dismissed_workers)
            daemon.send_signal(signal.SIGTERM)
            until(lambda: "told to stop during a restart" in daemon.log)
        slow.end()
        assert slow.read_to_end() == unread.upper()
        slow.close()
        assert daemon.wait() == 0


def test_stop_for_a_restart_after_a_stop_is_no_reason_to_hurry(service: Service) -> None:
    with service.daemon() as daemon:
        slow = service.connect(4096)
        unread = daemon.clog(slow)
        daemon.send_signal(signal.SIGTERM)
        until(daemon.has_dismissed_workers)
        daemon.send_signal(signal.SIGUSR2)
        slow.end()
        assert slow.read_to_end() == unread.upper()
        slow.close()
        assert daemon.wait() == 0


def test_connections_end_where_nothing_keeps_them(tmp_path: Path) -> None:
    with Manager(str(tmp_path / "notify")) as manager, Daemon(manager=manager) as daemon:
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        daemon.send_signal(signal.SIGUSR2)
        assert client.read_to_end() == b""
        client.close()
        assert daemon.wait() == 0
        assert not manager.count("FDSTORE=1")
