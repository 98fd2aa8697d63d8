"""Clients that are slow, silent or stop reading: given up at their deadline, and not before."""

import heapq
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from integration.client import Client, make_socket, many_lines, where
from integration.daemon import Daemon
from integration.measures import scaled
from waiting import DEADLINE, until

CLIENTS = scaled(200, 5000)

#: Fewer, because all that they send keeps the daemon busy until they are stalled.
FLOODING_CLIENTS = scaled(200, 1000)
TIMEOUT = scaled(1.25, 10.0)

#: Longer, where the clients must keep to their deadlines themselves: they are on a busy machine.
PATIENCE = scaled(4.0, 10.0)

#: What a client sends that reads nothing.
FLOOD = (b"x" * 99 + b"\n") * 600

#: Seconds between two bytes of a slow client.
PAUSE = scaled(0.25, 1.0)


def test_slow_writers_are_given_up_at_line_timeout() -> None:
    with Daemon(workers=2, line_timeout=TIMEOUT, idle_timeout=60) as daemon:
        with many_clients(daemon, CLIENTS) as clients:
            lives = lifetimes(clients, says=b"x", again=True)
        check(lives)
        assert daemon.counters()["line_timeout"] == CLIENTS


def test_silent_clients_are_given_up_at_idle_timeout() -> None:
    with Daemon(workers=2, idle_timeout=TIMEOUT) as daemon:
        with many_clients(daemon, CLIENTS) as clients:
            lives = lifetimes(clients, says=b"a line\n")
        check(lives)
        assert daemon.counters()["idle_timeout"] == CLIENTS


def test_clients_that_stop_reading_are_given_up_at_write_timeout() -> None:
    with Daemon(workers=2, write_timeout=TIMEOUT) as daemon:
        with many_clients(daemon, FLOODING_CLIENTS, buffer=4096) as clients:
            lives = lifetimes(clients, flood=FLOOD)
        # The last that a client could send went into buffers, after the daemon had sent its last.
        check(lives, earliest=0)
        assert daemon.counters()["write_timeout"] == FLOODING_CLIENTS


def test_clients_that_keep_the_rules_stay() -> None:
    """However long they are connected: each line, and each pause, is short enough."""
    with Daemon(workers=1, line_timeout=PATIENCE, idle_timeout=PATIENCE) as daemon:
        client, began = daemon.connect(), time.monotonic()
        while time.monotonic() < began + 1.5 * PATIENCE:
            client.send(b"a line ")
            time.sleep(PATIENCE / 5)  # the client's own pace
            client.send(b"in its own time\n")
            assert client.read_line() == b"A LINE IN ITS OWN TIME\n"
        assert daemon.counters()["open"] == 1


def test_client_that_reads_slowly_stays() -> None:
    """By default, the kernel accepts megabytes, and then nothing until a third of it has been
    read."""
    step, steps = 65536, 8
    sent = many_lines()[: 64 * step]
    with Daemon(workers=1, write_timeout=PATIENCE) as daemon:
        client = daemon.connect(receive_buffer=8192)
        sender = threading.Thread(target=send_all, args=(client, sent))
        sender.start()
        for start in range(0, steps * step, step):
            time.sleep(PATIENCE / 5)  # the client's own pace
            assert client.read(step) == bytes(sent[start : start + step]).upper()
        assert client.read_to_end() == bytes(sent[steps * step :]).upper()
        sender.join()
        assert daemon.counters()["write_timeout"] == 0


def send_all(client: Client, data: memoryview) -> None:
    client.send(data)
    client.end()


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({}, {"slow", "silent", "stalled"}),
        # Every connection is checked for the sake of one.
        ({"line_timeout": TIMEOUT / 2}, {"silent", "stalled"}),
        ({"idle_timeout": TIMEOUT / 2}, {"stalled"}),
        ({"write_timeout": TIMEOUT / 2}, {"slow", "silent"}),
    ],
)
def test_timeouts_of_zero_are_none(settings: dict[str, float], stay: set[str]) -> None:
    none: dict[str, Any] = {"line_timeout": 0.0, "idle_timeout": 0.0, "write_timeout": 0.0}
    with Daemon(workers=1, **none) as daemon:
        slow, silent, stalled = (daemon.connect(receive_buffer=4096) for _ in range(3))
        slow.send(b"no new")
        sent = daemon.clog(stalled)
        # Only now: on a busy machine, what came before may take longer than the timeout.
        daemon.reload(**settings)
        until(lambda: daemon.counters()["open"] == len(stay))
        time.sleep(TIMEOUT)  # that nothing happens can only be seen when the time has passed
        if "slow" in stay:
            slow.send(b"line\n")
            assert slow.read_line() == b"NO NEWLINE\n"
        if "silent" in stay:
            assert silent.ask(b"still there?") == b"STILL THERE?"
        if "stalled" in stay:
            stalled.end()
            assert stalled.read_to_end() == sent.upper()


@contextmanager
def many_clients(
    daemon: Daemon, count: int, buffer: int = 0
) -> Iterator[dict[socket.socket, float]]:
    """Connected clients, and when each connected."""
    with ExitStack() as stack:
        clients = {}
        for _ in range(count):
            client = stack.enter_context(make_socket(daemon.addresses[0]))
            if buffer:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            client.connect(where(daemon.addresses[0]))
            client.setblocking(False)
            clients[client] = time.monotonic()
        yield clients


def lifetimes(
    clients: dict[socket.socket, float],
    *,
    says: bytes = b"",
    again: bool = False,
    flood: bytes = b"",
) -> list[float]:
    """Seconds from just before each client first said something, or last could send some of a
    `flood`, to when the daemon ended the connection. They read nothing until then, and begin one
    after the other within half of TIMEOUT; those that say it again do so after each pause."""
    lives, alive = [], {client.fileno(): client for client in clients}
    began = {client.fileno(): connected for client, connected in clients.items()}
    start, step = time.monotonic(), TIMEOUT / 2 / len(clients)
    turns = [(start + step * number, fd, True) for number, fd in enumerate(alive)] if says else []
    with select.epoll() as poll:
        for fd in alive:
            poll.register(fd, select.EPOLLRDHUP | (select.EPOLLOUT | select.EPOLLET) * bool(flood))
        while alive and time.monotonic() < start + 2 * TIMEOUT + DEADLINE:
            began |= dict(take_turns(turns, alive, says, again))
            for fd, events in poll.poll(step):
                if events & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR):
                    lives.append(time.monotonic() - began[fd])
                    poll.unregister(fd)
                    del alive[fd]
                elif flood:
                    while try_send(alive[fd], flood):
                        began[fd] = time.monotonic()
    return lives


def take_turns(
    turns: list[tuple[float, int, bool]], alive: dict[int, socket.socket], says: bytes, again: bool
) -> Iterator[tuple[int, float]]:
    """Have those clients speak whose turn it is; those that do for the first time, and when."""
    while turns and turns[0][0] <= (now := time.monotonic()):
        when, fd, first = heapq.heappop(turns)
        if fd in alive and try_send(alive[fd], says):
            if first:
                yield fd, now
            if again:
                heapq.heappush(turns, (when + PAUSE, fd, False))


def try_send(client: socket.socket, data: bytes) -> bool:
    try:
        client.send(data)
    except OSError:  # it can take no more now, or has just been given up
        return False
    return True


def check(lives: list[float], earliest: float = TIMEOUT / 2) -> None:
    """The times at which a loop iteration of the daemon began count, and a busy machine may be
    late with the rest of it. The deadlines themselves are those of tests/unit/test_deadlines.py"""
    assert lives, "nobody was given up"
    print(f"{len(lives)} clients given up after {min(lives):.2f} to {max(lives):.2f} s")
    assert min(lives) >= earliest
