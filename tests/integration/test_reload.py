"""Reload: with SIGHUP, of a good file and of a bad one."""

import contextlib
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import CLOCK_MONOTONIC, clock_gettime

import pytest

from integration.client import OWN, Client, is_refused, make_socket
from integration.daemon import Daemon
from integration.processes import stopped
from integration.service import Service
from waiting import until

#: Seconds that a new worker may take on a busy machine.
LATENESS = 2.0


def test_reload() -> None:
    with Daemon() as daemon:
        old, half = daemon.connect(), daemon.connect()
        assert old.ask(b"one") == b"ONE"
        half.send(b"hal")
        until(lambda: daemon.counters()["open"] == 2)

        daemon.configure(framing="none")
        before = clock_gettime(CLOCK_MONOTONIC) * 1_000_000
        daemon.send_signal(signal.SIGHUP)
        reloading = daemon.manager.wait("RELOADING=1")
        assert before <= int(reloading.lines[1].removeprefix("MONOTONIC_USEC="))
        daemon.manager.wait("READY=1")

        assert half.read(3) == b"HAL"
        for client in (half, old, daemon.connect()):
            client.send(b"two")  # answered though no newline follows
            assert client.read(3) == b"TWO"
        assert "reloaded: " in daemon.log


def test_reload_of_a_bad_file_changes_nothing() -> None:
    with Daemon() as daemon:
        workers = daemon.workers()
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"

        daemon.configure("max_lines = 3\n")
        before = clock_gettime(CLOCK_MONOTONIC) * 1_000_000
        daemon.send_signal(signal.SIGHUP)
        reloading = daemon.manager.wait("RELOADING=1")
        assert before <= int(reloading.lines[1].removeprefix("MONOTONIC_USEC="))
        daemon.manager.wait("READY=1")
        daemon.manager.wait("STATUS=.*the last reload failed; see the log")

        assert f"{daemon.config}:" in daemon.log
        assert "max_lines: unknown setting; did you mean max_line?" in daemon.log
        assert daemon.workers() == workers
        assert client.ask(b"two") == b"TWO"

        daemon.configure()
        daemon.reload()
        until(lambda: "failed" not in daemon.manager.status)


def test_reload_that_cannot_listen_changes_nothing() -> None:
    with Daemon() as daemon, make_socket("127.0.0.1:0") as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        daemon.configure(listen=["127.0.0.1:0", f"{OWN}-reload", address])
        daemon.send_signal(signal.SIGHUP)
        daemon.manager.wait("RELOADING=1")
        daemon.manager.wait("READY=1")
        assert f"cannot listen on {address}: Address already in use" in daemon.log
        assert daemon.connect().ask(b"hello") == b"HELLO"
        with pytest.raises(ConnectionRefusedError):
            daemon.connect(f"{OWN}-reload")


def test_reload_whose_workers_cannot_start_leaves_nothing_behind(service: Service) -> None:
    with service.daemon(wrapper=("prlimit", "--nofile=64"), keepalive=70) as daemon:
        client, workers = service.connect(), daemon.workers()
        assert client.ask(b"one") == b"ONE"
        daemon.configure(workers=64, log_level="error", keepalive=30)
        daemon.send_signal(signal.SIGHUP)
        daemon.manager.wait("RELOADING=1")
        daemon.manager.wait("READY=1")
        assert "keeping the current configuration: cannot start a worker" in daemon.log
        until(lambda: daemon.workers() == workers)

        idle = service.listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        assert idle == 70
        assert client.ask(b"two") == b"TWO"
        counters = daemon.counters()  # logged at the level info
        assert (counters["reloads_success"], counters["reloads_failure"]) == (0, 1)


def test_reloads_in_a_row_are_each_answered() -> None:
    with Daemon() as daemon:
        client = daemon.connect()
        for number in range(3):
            daemon.configure(max_line=1000 + number)
            daemon.send_signal(signal.SIGHUP)
            daemon.manager.wait("RELOADING=1")
            daemon.manager.wait("READY=1")
            assert client.ask(b"hello") == b"HELLO"
        for _ in range(20):
            daemon.send_signal(signal.SIGHUP)
        until(lambda: daemon.manager.messages[-1].text.startswith("STATUS"))
        until(lambda: daemon.manager.count("RELOADING=1") + 1 == daemon.manager.count("READY=1"))
        assert client.ask(b"hello") == b"HELLO"


def test_reload_asked_for_during_a_reload_follows_it() -> None:
    with Daemon() as daemon:
        for number in range(1, 11):
            daemon.configure(lines_per_connection=number)
            daemon.send_signal(signal.SIGHUP)
            daemon.manager.wait("RELOADING=1")
        daemon.manager.wait("READY=1")
        client = daemon.connect()
        client.send(b"line\n" * 20)
        assert client.read_to_end() == b"LINE\n" * 10


def test_workers_that_leave_at_the_same_time_are_all_buried() -> None:
    """One SIGCHLD may stand for several."""
    with Daemon(drain_timeout=60) as daemon:
        old = daemon.workers()
        with stopped(*old):
            daemon.reload(max_line=1000)
            with stopped(daemon.pid):
                for pid in old:
                    os.kill(pid, signal.SIGKILL)
                until(lambda: len(daemon.zombies()) == len(old))
            until(lambda: not daemon.zombies())


def test_connections_survive_reload_whatever_their_state() -> None:
    with Daemon() as daemon:
        half = [daemon.connect() for _ in range(20)]
        for client in half:
            client.send(b"line\nhalf a ")
            assert client.read_line() == b"LINE\n"
        slow = [daemon.connect(receive_buffer=4096) for _ in range(3)]
        sent = [daemon.clog(client) for client in slow]
        for client in slow[1:]:
            client.end()

        for _ in range(2):
            daemon.reload()

        for client in half:
            assert client.ask(b"line") == b"HALF A LINE"
        slow[0].end()
        assert [client.read_to_end() for client in slow] == [data.upper() for data in sent]


def test_no_connection_waits_for_the_next_one_after_a_reload() -> None:
    """An exiting worker may have been woken for a connection that no other worker then sees."""
    with Daemon() as daemon, ThreadPoolExecutor(1) as pool:
        address = daemon.addresses[0]
        goes_on = threading.Event()
        goes_on.set()
        answered: list[bytes] = []

        def connect_and_ask() -> None:
            while goes_on.is_set():
                with contextlib.closing(Client(address)) as client:
                    answered.append(client.ask(b"hello"))

        def has_answered(count: int) -> bool:
            return done.done() or len(answered) >= count

        done = pool.submit(connect_and_ask)
        try:
            for _ in range(20):
                daemon.reload()
                # The second from here on was made after the reload.
                until(partial(has_answered, len(answered) + 2))
        finally:
            goes_on.clear()
        done.result()
        assert set(answered) == {b"HELLO"}


def test_reload_changes_the_number_of_workers() -> None:
    with Daemon(workers=1) as daemon:
        clients = [daemon.connect() for _ in range(20)]
        for count in (3, 1):
            daemon.reload(workers=count)
            daemon.wait_for_workers(count)
            assert [client.ask(b"hello") for client in clients] == [b"HELLO"] * 20


def test_reload_changes_the_addresses() -> None:
    with Daemon(listen=["127.0.0.1:0", f"{OWN}-old"]) as daemon:
        old = daemon.connect(f"{OWN}-old")
        kept = daemon.addresses[0]

        daemon.reload(listen=[f"{OWN}-new", "127.0.0.1:0"])
        until(lambda: f"{OWN}-new" in daemon.manager.status)

        assert daemon.connect(kept).ask(b"kept") == b"KEPT"
        assert daemon.connect(f"{OWN}-new").ask(b"new") == b"NEW"
        assert old.ask(b"old") == b"OLD"
        until(lambda: is_refused(f"{OWN}-old"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("localhost:0", ["{port}"]),
        ("0", ["localhost:{port}", "metrics=127.0.0.1:{port}"]),
        ("0.0.0.0:0", ["127.0.0.1:{port}"]),
        ("127.0.0.1:0", ["0.0.0.0:{port}"]),
    ],
)
def test_reload_names_our_own_address_that_overlaps(before: str, after: list[str]) -> None:
    with Daemon(listen=[before]) as daemon:
        own = daemon.addresses[0]
        for address in (one.format(port=own.rpartition(":")[2]) for one in after):
            daemon.configure(listen=[address])
            daemon.send_signal(signal.SIGHUP)
            line = line_with(daemon, f"cannot listen on {address.rpartition('=')[2]}: this")
            assert f": this daemon is already listening on {own}," in line
            assert "overlaps" in line
            assert "restart it to change from one to the other" in line
        assert daemon.connect(own.replace("[::]", "127.0.0.1")).ask(b"hello") == b"HELLO"


def line_with(daemon: Daemon, text: str) -> str:
    """The first line of the log that contains this, once there is one."""
    return until(lambda: [line for line in daemon.log.splitlines() if text in line])[0]


def test_another_program_that_is_in_the_way_of_a_reload_is_told_from_us() -> None:
    with make_socket("127.0.0.1:0") as other, Daemon(listen=["[::1]:0"]) as daemon:
        other.bind(("127.0.0.9", int(daemon.addresses[0].rpartition(":")[2])))
        other.listen()
        daemon.configure(listen=[f"127.0.0.9:{other.getsockname()[1]}"])
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "another program is listening there" in daemon.log)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", f"{OWN}-named"], ids=["TCP", "Unix"])
def test_reload_can_name_the_service_of_an_address(address: str) -> None:
    with Daemon() as daemon:
        # A port that is free again once the daemon has left it.
        where = address.format(port=daemon.addresses[0].rpartition(":")[2])
        daemon.reload(listen=[where])
        clients = [daemon.connect(where)]
        for listen in ([f"upper={where}"], [where], [where, f"upper={where}"]):
            daemon.reload(listen=listen)
            clients.append(daemon.connect(where))
            assert [client.ask(b"hello") for client in clients] == [b"HELLO"] * len(clients)
        until(lambda: daemon.addresses == [where])


@pytest.mark.usefixtures("many_in_flight")
def test_who_waits_at_an_address_that_a_reload_drops_is_served() -> None:
    with Daemon(listen=["127.0.0.1:0", f"{OWN}-old"]) as daemon:
        with stopped(*daemon.workers()):
            waiting = [daemon.connect(f"{OWN}-old") for _ in range(40)]
            daemon.reload(listen=["127.0.0.1:0"])
        assert [client.ask(b"hello") for client in waiting] == [b"HELLO"] * 40


def test_worker_killed_during_reload_is_replaced() -> None:
    with Daemon() as daemon:
        first = daemon.workers()
        with stopped(*first):
            daemon.configure(max_line=100)
            daemon.send_signal(signal.SIGHUP)
            new = until(lambda: set(daemon.workers()) - set(first))
            for pid in new:
                os.kill(pid, signal.SIGKILL)
        daemon.manager.wait("RELOADING=1")
        daemon.manager.wait("READY=1")
        daemon.wait_for_workers(2)
        assert daemon.connect().ask(b"hello") == b"HELLO"
