"""Stops under a load balancer: `shutdown_delay`, and what the agent says meanwhile."""

import os
import select
import signal
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from integration.client import Client, name_of
from integration.daemon import Daemon
from integration.scraper import LISTEN, get, value
from integration.service import Service
from waiting import until

#: Seconds that no test waits for.
LONG = 3600.0

HERE, LEAVING = b"up 100%\n", b"up 0%\n"


class Sockets(NamedTuple):
    """What a service manager has of the service."""

    upper: socket.socket
    agent: socket.socket

    def daemon(self, **settings: Any) -> Daemon:
        return Daemon(passed=list(self._asdict().items()), **settings)

    def agent_says(self) -> bytes:
        asking = Client(name_of(self.agent))
        try:
            return asking.read_to_end()
        finally:
            asking.close()


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    with (
        socket.create_server(("127.0.0.1", 0)) as upper,
        socket.create_server(("127.0.0.1", 0)) as agent,
    ):
        yield Sockets(upper, agent)


def test_agent_answers_immediately_and_closes(sockets: Sockets) -> None:
    with sockets.daemon() as daemon:
        assert sockets.agent_says() == HERE
        asking = Client(name_of(sockets.agent))
        asking.send(b"state?\n" * 1000)  # agent-send
        assert asking.read_to_end() == HERE
        asking.close()
        until(lambda: daemon.counters()["open"] == 0)
        assert daemon.counters()["probe"] == daemon.counters()["lines"] == 0


def test_agent_of_a_daemon_that_binds_its_addresses() -> None:
    listen = ["127.0.0.1:0", "agent=127.0.0.1:0"]
    with Daemon(listen=listen, shutdown_delay=LONG) as daemon:
        upper, agent = daemon.addresses
        where = agent.removeprefix("agent=")
        assert daemon.connect(where).read_to_end() == HERE
        daemon.send_signal(signal.SIGTERM)
        until(lambda: daemon.connect(where).read_to_end() == LEAVING)
        assert daemon.connect(upper).ask(b"new") == b"NEW"
        daemon.send_signal(signal.SIGTERM)


def test_clients_are_served_during_the_delay(sockets: Sockets) -> None:
    with sockets.daemon(shutdown_delay=LONG) as daemon:
        before = daemon.connect()
        assert before.ask(b"before") == b"BEFORE"
        daemon.send_signal(signal.SIGTERM)
        until(lambda: sockets.agent_says() == LEAVING)
        daemon.manager.wait("STOPPING=1")
        daemon.manager.wait(f"EXTEND_TIMEOUT_USEC={int(LONG + 12) * 10**6}")
        until(lambda: daemon.manager.status.startswith("Stopping shortly, listening on "))
        assert daemon.connect().ask(b"new") == b"NEW"
        assert before.ask(b"more") == b"MORE"
        daemon.send_signal(signal.SIGTERM)
        for client in daemon.clients:
            assert client.read_to_end() == b""
            client.close()
        assert daemon.wait() == 0
        assert "stopping immediately" not in daemon.log


# What is told over HTTP


def health(daemon: Daemon, path: str = "/ready") -> tuple[int, str]:
    """The status and the text of a page for probes."""
    status, _, text = get(daemon.address_of("metrics"), path)
    return status, text


def test_probes_are_told_that_the_service_is_leaving() -> None:
    with Daemon(listen=LISTEN, shutdown_delay=LONG, workers=2) as daemon:
        assert health(daemon) == (200, "ready\n")
        assert value(daemon, "tcpupperd_ready") == 1
        assert value(daemon, "tcpupperd_workers", state="serving") == 2
        daemon.send_signal(signal.SIGTERM)
        until(lambda: health(daemon) == (503, "leaving\n"))
        assert health(daemon, "/live") == (200, "live\n")
        assert value(daemon, "tcpupperd_ready") == 0
        assert value(daemon, "tcpupperd_workers", state="serving") == 0
        assert value(daemon, "tcpupperd_workers", state="leaving") == 2
        assert "The service is about to stop" in health(daemon, "/")[1]
        assert daemon.connect().ask(b"new") == b"NEW"
        daemon.send_signal(signal.SIGTERM)


def test_full_server_is_alive_but_not_ready() -> None:
    """The probes themselves take no place: with one left, the server is not full."""
    with Daemon(listen=LISTEN, workers=1, max_connections=3) as daemon:
        clients = [daemon.connect() for _ in range(2)]
        assert {client.ask(b"hello") for client in clients} == {b"HELLO"}
        silent = [daemon.connect(daemon.address_of("metrics")) for _ in range(2)]
        until(lambda: daemon.counters()["open"] == 4)
        assert health(daemon) == (200, "ready\n")
        for one in silent:
            one.close()
        clients.append(daemon.connect())
        assert clients[-1].ask(b"hello") == b"HELLO"
        assert health(daemon) == (503, "full\n")
        assert health(daemon, "/live") == (200, "live\n")
        clients.pop().close()
        until(lambda: health(daemon) == (200, "ready\n"))


def test_server_without_a_live_worker_answers_no_probe() -> None:
    with Daemon(listen=LISTEN, workers=1) as daemon:
        [worker] = daemon.workers()
        os.kill(worker, signal.SIGSTOP)
        try:
            probe = daemon.connect(daemon.address_of("metrics"))
            probe.send(b"GET /live HTTP/1.0\r\n\r\n")
            assert not select.select([probe.socket], [], [], 0.5)[0]
        finally:
            os.kill(worker, signal.SIGCONT)
        assert probe.read_line() == b"HTTP/1.1 200 OK\r\n"


def test_delay_ends_by_itself(sockets: Sockets) -> None:
    with sockets.daemon(shutdown_delay=0.3) as daemon:
        client = daemon.connect()
        assert client.ask(b"before") == b"BEFORE"
        daemon.send_signal(signal.SIGTERM)
        daemon.manager.wait("STATUS=Stopping shortly, .*")
        daemon.manager.wait("STATUS=Stopping; .*")
        assert client.read_to_end() == b""
        client.close()
        assert daemon.wait() == 0


def test_worker_that_dies_during_the_delay_is_replaced(sockets: Sockets) -> None:
    with sockets.daemon(shutdown_delay=LONG, workers=1) as daemon:
        assert daemon.connect().ask(b"one") == b"ONE"
        daemon.send_signal(signal.SIGTERM)
        until(lambda: sockets.agent_says() == LEAVING)
        [worker] = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        daemon.wait_for_workers(1, without=worker)
        assert daemon.connect().ask(b"two") == b"TWO"
        assert sockets.agent_says() == LEAVING


def test_reload_is_put_off_for_good(sockets: Sockets) -> None:
    with sockets.daemon(shutdown_delay=LONG) as daemon:
        daemon.send_signal(signal.SIGTERM)
        until(lambda: sockets.agent_says() == LEAVING)
        daemon.send_signal(signal.SIGHUP)
        assert daemon.counters()  # it answers, having fetched SIGHUP before
        assert daemon.manager.count("RELOADING=1") == 0


def test_restart_does_not_wait(service: Service) -> None:
    with service.daemon(shutdown_delay=LONG):
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
    with service.daemon(shutdown_delay=LONG):
        assert client.ask(b"two") == b"TWO"


def test_restart_ends_the_delay_and_keeps_connections(service: Service) -> None:
    with service.daemon(shutdown_delay=LONG) as daemon:
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        daemon.send_signal(signal.SIGTERM)
        service.manager.wait("STOPPING=1")
    with service.daemon(shutdown_delay=LONG):
        assert client.ask(b"two") == b"TWO"
