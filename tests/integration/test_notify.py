"""What the service manager is told, over real datagram sockets, good and bad ones."""

import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest

from integration.client import OWN
from integration.daemon import Daemon
from integration.manager import Manager
from integration.service import Service
from waiting import until

#: What may go together in one datagram: a state and its details.
COMPOUNDS = (
    ["RELOADING", "MONOTONIC_USEC"],
    ["FDSTORE", "FDNAME", "FDPOLL"],
    ["FDSTOREREMOVE", "FDNAME"],
)


def test_life_of_a_daemon(tmp_path: Path) -> None:
    with Manager(str(tmp_path / "notify"), store=True) as manager:
        with Daemon(manager=manager, wrapper=("env", "WATCHDOG_USEC=60000000")) as daemon:
            daemon.reload()
            daemon.configure("wrong = 1\n")
            daemon.send_signal(signal.SIGHUP)
            manager.wait("STATUS=.*the last reload failed.*")
        told = [[line.partition("=")[0] for line in one.lines] for one in manager.messages]
    assert all(len(names) == 1 or names in COMPOUNDS for names in told)
    states = [names[0] for names in told]
    assert [one for one in states if one in ("READY", "RELOADING", "STOPPING")] == [
        "READY",
        *("RELOADING", "READY") * 2,
        "STOPPING",
    ]
    assert states.index("FDSTORE") < states.index("READY")
    assert states.index("STOPPING") < states.index("EXTEND_TIMEOUT_USEC")


def test_status_line_summarises_the_state() -> None:
    local = f"{OWN}-status"
    with Daemon(listen=["127.0.0.1:0", local], workers=3, max_connections=50) as daemon:
        address = daemon.addresses[0]
        until(lambda: daemon.manager.status)
        assert daemon.manager.status == (
            f"Listening on {address}, {local}; 3 workers, 0 of 150 connections; 0 lines answered"
        )
        client = daemon.connect()
        assert client.ask(b"hello") == b"HELLO"
        assert client.ask(b"hello") == b"HELLO"
        until(lambda: daemon.counters()["lines"] == 2)
        until(lambda: "3 workers, 1 of 150 connections; 2 lines answered" in daemon.manager.status)
        client.close()
        daemon.stop()
        until(lambda: daemon.manager.status.startswith("Stopping; "))


def test_status_line_names_the_problem() -> None:
    with Daemon(workers=1) as daemon:

        def says(text: str) -> None:
            until(lambda: daemon.counters() and text in daemon.manager.status)

        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        daemon.wait_for_workers(1, without=worker)
        says("; 1 worker died")
        daemon.configure(max_line=100)
        says(f"; {daemon.config} changed on disk; reload to apply it")
        daemon.reload()
        until(lambda: "was changed" not in daemon.manager.status)


def test_status_line_says_if_all_workers_are_full_and_clients_wait() -> None:
    with Daemon(workers=1, max_connections=3) as daemon:
        clients = [daemon.connect() for _ in range(3)]
        assert [client.ask(b"hello") for client in clients] == [b"HELLO"] * 3
        waiting = [daemon.connect() for _ in range(17)]
        daemon.send_signal(signal.SIGCHLD)  # the supervisor checks
        until(lambda: "1 worker, 3 of 3 connections, full, 17 waiting;" in daemon.manager.status)
        for client in clients:
            client.close()
        assert waiting[0].ask(b"hello") == b"HELLO"


def test_status_line_shows_the_connections_soon_after_a_restart(service: Service) -> None:
    """Nothing but the workers that have taken them over wakes the supervisor."""
    with service.daemon(max_connections=50):
        clients = [service.connect() for _ in range(20)]
        assert [client.ask(b"hello") for client in clients] == [b"HELLO"] * 20
    with service.daemon(max_connections=50):
        until(lambda: ", 20 of 100 connections;" in service.manager.status)


def test_status_is_utf8_in_any_locale(tmp_path: Path) -> None:
    path = f"{tmp_path}/größe ✓ \N{GRINNING FACE}"
    with Daemon(listen=[path], wrapper=("env", "LC_ALL=C")) as daemon:
        daemon.manager.wait(f"STATUS=Listening on {path}; .*")


def test_status_is_one_line(tmp_path: Path) -> None:
    """Otherwise, any user who may name a file could tell the service manager anything."""
    path = f"{tmp_path}/socket\nREADY=1\n"
    with Daemon(listen=[path]) as daemon:
        until(lambda: daemon.manager.status)
        assert daemon.manager.count("READY=1") == 1


def test_manager_at_an_abstract_address() -> None:
    address = f"{OWN}-manager"
    with Manager(address) as manager, Daemon(manager=manager) as daemon:
        daemon.stop()
        manager.wait("STOPPING=1")


@pytest.mark.parametrize("address", ["/nonexistent/notify", "@tcpupperd-nobody", "vsock:2:1"])
def test_missing_manager_is_mentioned_once(address: str) -> None:
    with Daemon(notify=False, wrapper=("env", f"NOTIFY_SOCKET={address}")) as daemon:
        assert daemon.connect().ask(b"hello") == b"HELLO"
        daemon.reload()
        assert daemon.connect().ask(b"hello") == b"HELLO"
        assert daemon.log.count("cannot send READY=1 to the service manager: ") == 1
        assert daemon.log.count("cannot send") == 1


def test_full_socket_holds_nothing_up(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as full:
        full.bind(path)
        fill(path)
        with Daemon(notify=False, wrapper=("env", f"NOTIFY_SOCKET={path}")) as daemon:
            assert daemon.connect().ask(b"hello") == b"HELLO"
            daemon.reload()
            assert daemon.connect().ask(b"hello") == b"HELLO"
            assert daemon.log.count(" to the service manager: ") == 1
            empty(full)
            daemon.reload()  # from now on it is heard again
            until(lambda: b"READY=1" in empty(full))


def test_manager_that_is_started_again_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Manager(str(path)))
        daemon = stack.enter_context(Daemon(manager=first))
        path.unlink()
        daemon.reload()
        assert first.count("READY=1") == 1
        assert daemon.log.count(" to the service manager: ") == 1
        with Manager(str(path)) as second:
            daemon.reload()
            second.wait("RELOADING=1")
            second.wait("READY=1")
            daemon.stop()
            second.wait("STOPPING=1")


def test_workers_tell_the_manager_nothing() -> None:
    """NotifyAccess=main would have each of their messages logged as an error."""
    with Daemon() as daemon:
        for pid in daemon.workers():
            os.kill(pid, signal.SIGKILL)
        daemon.wait_for_workers(2)
        daemon.reload()
        daemon.stop()
        daemon.manager.wait("STOPPING=1")
        assert daemon.manager.senders == {daemon.pid}


def fill(path: str) -> None:
    """Send datagrams to a socket that is not read until it takes no more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                one.sendto(b"X_FULL=1", path)


def empty(one: socket.socket) -> list[bytes]:
    """All that waits in a socket."""
    one.setblocking(False)
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(one.recv(4096))
    return found


def test_status_fits_into_what_the_service_manager_reads() -> None:
    """systemd drops a message longer than 4096 bytes, with all that is in it."""
    names = [f"{OWN}-{'x' * 60}-{number}" for number in range(80)]
    with Daemon(listen=names, max_connections=50) as daemon:
        daemon.configure("nonsense")
        daemon.send_signal(signal.SIGHUP)
        message = daemon.manager.wait("STATUS=.*the last reload failed; see the log")
        assert 4000 < len(message.text.encode()) <= 4096
        assert "; 2 workers, 0 of 100 connections; " in message.text
