"""Restarts under a service manager that keeps descriptors: no connection notices.

The test is the service manager: it holds the listening socket, keeps what it is given by FDSTORE=1
(FileDescriptorStoreMax= of systemd.service(5)), and passes all of it to the next daemon.
"""

import array
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.client import Client
from integration.daemon import Daemon
from integration.manager import Manager
from integration.processes import is_running, stopped, until
from tcpupperd.processes.channel import GIVE_END, TAKE_END
from tcpupperd.processes.handover import VERSION, Connection, give

MANY = 2000


class Service:
    """What outlives the daemons."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        host, port = self.listener.getsockname()
        self.address = f"{host}:{port}"
        self.clients: list[Client] = []

    def daemon(self, *options: str, **settings: Any) -> Daemon:
        """A daemon that is passed the listening socket, and all that is stored after it. The end
        of its context is a stop for a restart."""
        passed = [("tcpupperd.socket", self.listener), *self.manager.stored.items()]
        daemon = Daemon(*options, manager=self.manager, passed=passed, **settings)
        daemon.ended_by = signal.SIGUSR2
        return daemon

    def connect(self, receive_buffer: int = 0) -> Client:
        """A client that outlives the daemons too."""
        client = Client(self.address, receive_buffer)
        self.clients.append(client)
        return client


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Manager(str(tmp_path / "notify"), store=True) as manager:
        service = Service(manager)
        with service.listener:
            yield service
            for client in service.clients:
                client.close()


def test_channel_is_stored_once(service: Service) -> None:
    with service.daemon():
        assert service.manager.stored.keys() == {GIVE_END, TAKE_END}
    with service.daemon() as daemon:
        daemon.reload()
    stores = [message for message in service.manager.messages if "FDSTORE=1" in message.lines]
    assert len(stores) == 2
    assert all("FDPOLL=0" in message.lines for message in stores)


def test_connections_go_on_in_the_next_daemon_whatever_their_state(service: Service) -> None:
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


def test_lines_go_on_being_counted(service: Service) -> None:
    with service.daemon(lines_per_connection=3):
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
    with service.daemon(lines_per_connection=3):
        assert client.ask(b"two") == b"TWO"
    with service.daemon(lines_per_connection=3):
        client.send(b"three\nfour\n")
        assert client.read_to_end() == b"THREE\n"


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
        until(lambda: daemon.counters()["taken"] == MANY)
        assert daemon.counters()["open"] == MANY


def test_a_start_that_fails_in_between_loses_nothing(service: Service) -> None:
    with service.daemon() as daemon:
        client = service.connect()
        client.send(b"half a ")
        until(lambda: daemon.counters()["open"] == 1)
    status, _ = service.daemon("--workers", "none").run()
    assert status == 2
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


def test_drain_ends_what_nobody_has_taken_over_yet(service: Service) -> None:
    with service.daemon() as daemon:
        with stopped(*daemon.workers()):
            clients = [service.connect() for _ in range(10)]
            for client in clients:
                client.send(b"one\n")
                request, address = service.listener.accept()
                with request:
                    give(service.manager.stored[GIVE_END], [Connection(request, address)])
            daemon.send_signal(signal.SIGTERM)
            until(daemon.has_dismissed_workers)
        assert [client.read_to_end() for client in clients] == [b"ONE\n"] * 10
        for client in clients:
            client.close()
        assert daemon.wait() == 0


@pytest.mark.parametrize(
    ("greeting", "why"),
    [
        (b"tcpupperd\0" + bytes([0, VERSION + 1, 0, 1]), f"version {VERSION + 1}, not version"),
        (b"tcpupperd\0" + bytes([0, VERSION, 0, 1]), ""),  # its state is empty
        (b"tcpupperd\0" + bytes([0, VERSION, 0, 7]), "7 connections came with 1 sockets"),
        (b"something else", "the format is"),
    ],
)
def test_connections_that_cannot_be_read_end_politely(
    service: Service, greeting: bytes, why: str
) -> None:
    with service.daemon() as daemon:
        whole = service.connect()
        assert whole.ask(b"one") == b"ONE"

    lost = service.connect()
    lost.send(b"not answered\n")
    request, _ = service.listener.accept()
    state = os.memfd_create("state")
    with request:
        files = [state, request.fileno()]
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
        service.manager.stored[GIVE_END].sendmsg([greeting], [rights])
    os.close(state)

    with service.daemon() as daemon:
        assert lost.read_to_end() == b""
        assert whole.ask(b"two") == b"TWO"
        until(lambda: daemon.counters()["damaged"] == 1)
        complaints = [line for line in daemon.log.splitlines() if "ERROR" in line]
        assert len(complaints) == 1
        assert "ending 1 connection taken over: " in complaints[0]
        assert why in complaints[0]


def test_stored_sockets_of_no_use_are_let_go(service: Service) -> None:
    stray, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        service.manager.stored["something"] = stray
        with service.daemon() as daemon:
            assert "closing the stored socket something" in daemon.log
            until(lambda: service.manager.stored.keys() == {GIVE_END, TAKE_END})
            assert daemon.connect(service.address).ask(b"hello") == b"HELLO"


def test_connections_end_where_nothing_keeps_them(tmp_path: Path) -> None:
    with (
        Manager(str(tmp_path / "notify")) as manager,
        Daemon(manager=manager) as daemon,
    ):
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        daemon.send_signal(signal.SIGUSR2)
        assert client.read_to_end() == b""
        client.close()
        assert daemon.wait() == 0
        assert not manager.count("FDSTORE=1")
