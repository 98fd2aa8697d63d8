"""Clients that write and never read."""

import select
import signal
import socket
import time
from contextlib import ExitStack
from typing import Any

import pytest

from integration.client import make_socket, where
from integration.daemon import Daemon
from integration.measures import cpu_share, private_kib, scaled
from waiting import DEADLINE, until

CLIENTS = scaled(30, 1000)

#: Lines that another client sends meanwhile.
ANSWERS = 500

#: What each client sends again and again: all that makes the daemon keep most.
INPUT = {
    "short lines": (b"x" * 63 + b"\n") * 1024,
    "long lines": b"x" * 200_000 + b"\n",
    "one line without end": b"x" * 65536,
}


@pytest.mark.parametrize("kind", INPUT)
def test_stalled_clients_cost_little(kind: str) -> None:
    with Daemon(workers=1) as daemon, ExitStack() as stack:
        workers = daemon.workers()
        other = daemon.connect()
        stalled = [stack.enter_context(stalling(daemon.addresses[0])) for _ in range(CLIENTS)]
        assert other.ask(b"all connected?") == b"ALL CONNECTED?"
        idle = private_kib(workers)
        write_until_stalled(stalled, INPUT[kind])

        each = (private_kib(workers) - idle) / CLIENTS
        print(f"{kind}: {each:.1f} KiB each")
        assert each <= 256
        until(lambda: cpu_share(workers, scaled(0.5, 30.0)) < 0.02)
        # Each answer takes one loop iteration: the stalled ones wake nobody.
        before = daemon.counters()["loop_iterations"]
        for _ in range(ANSWERS):
            assert other.ask(b"how long?") == b"HOW LONG?"
        assert daemon.counters()["loop_iterations"] - before <= ANSWERS + 20


def stalling(address: str) -> socket.socket:
    """A client that will not read. The smaller its buffers, the sooner it is stalled."""
    client = make_socket(address)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        client.setsockopt(socket.SOL_SOCKET, option, scaled(8192, 65536))
    client.connect(where(address))
    client.setblocking(False)
    return client


def write_until_stalled(clients: list[socket.socket], data: bytes) -> None:
    """Write at full speed until no client could for half a second."""
    give_up = time.monotonic() + scaled(DEADLINE, 10 * DEADLINE)
    sockets = {client.fileno(): client for client in clients}
    with select.epoll() as poll:
        for fd in sockets:
            poll.register(fd, select.EPOLLOUT)
        while ready := poll.poll(0.5):
            for fd, _ in ready:
                sockets[fd].send(data)
            assert time.monotonic() < give_up, "the daemon takes all that comes"


@pytest.mark.parametrize("setting", ["write_timeout", "drain_timeout"])
def test_client_whose_answer_is_cut_off_sees_a_reset(setting: str) -> None:
    """An end of file would say that it got all its answers."""
    settings: dict[str, Any] = {setting: 1}
    with Daemon(workers=1) as daemon:
        client = daemon.connect(receive_buffer=8192)
        daemon.clog(client)
        daemon.reload(**settings)  # only now, because a busy machine may take longer for that
        if setting == "drain_timeout":
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()
        else:
            until(lambda: daemon.counters()[setting] == 1)
        with pytest.raises(ConnectionResetError):
            client.read_to_end()
