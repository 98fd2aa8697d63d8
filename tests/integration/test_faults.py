"""Faults of the machine and of other processes that must cost no more than what they hit."""

import contextlib
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.embedding import ANY_PORT, connected, serving
from integration.processes import cannot
from outlive import listener
from tcpupperd import Config, UpperServer
from tcpupperd.address import pack
from tcpupperd.host.handshakes import in_handshake, sources
from tcpupperd.host.sockets import BACKLOG, Listener
from tcpupperd.processes import connection_format
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.processes.worker import Worker, WorkerContext
from tcpupperd.serving.acceptor import Acceptor
from tcpupperd.serving.counters import HANDED_OVER_IN, LONGEST_LINE, RESET, Tally
from tcpupperd.serving.fast_path import RECEIVE_SIZE
from tcpupperd.serving.poller import Poller
from tools import need
from waiting import DEADLINE

#: State of a TCP socket: linux/tcp_states.h.
LISTEN = 10

ROOT = Path(__file__).parents[2]


# Handover


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker in this process, with a channel that has both ends here."""
    send_end, receive_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    orders, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    scoreboard = Scoreboard(4)
    scoreboard.put(LONGEST_LINE, Config().max_line)
    receive_end.setblocking(False)
    context = WorkerContext(
        config=Config(),
        instance="tcpupperd",
        listeners=[],
        listeners_outlive_us=False,
        channel=(send_end, receive_end),
        channel_outlives_us=lambda: False,
        control=orders,
        numbers=scoreboard.claim().numbers,
        is_first=True,
        scoreboard=scoreboard,
        heartbeat=0.0,
        manager=0,
        path=None,
    )
    with Worker(context) as worker, send_end, receive_end, context.control:
        yield worker
    control.close()


def test_connection_that_cannot_be_watched_is_the_only_one_that_ends(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """epoll_ctl(2) fails with ENOSPC at the limit of a user; so does this, once."""
    watch = worker.poller.watch
    failures = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def watch_or_fail(fd: int, events: int) -> None:
        if failures:
            raise failures.pop()
        watch(fd, events)

    monkeypatch.setattr(worker.poller, "watch", watch_or_fail)
    pairs = [socket.socketpair() for _ in range(3)]
    given = [connection_format.Connection(theirs, "") for _, theirs in pairs]
    connection_format.send(worker._context.channel[0], given)
    for _, theirs in pairs:
        theirs.close()
    worker.handle_request()
    assert worker.tally.numbers[HANDED_OVER_IN] == 3
    assert worker.tally.numbers[RESET] == 1
    (unlucky, _), *others = pairs
    assert unlucky.recv(1) == b""
    for client, _ in others:
        client.sendall(b"still here\n")
        worker.handle_request()
        assert client.recv(100) == b"STILL HERE\n"
    for client, _ in pairs:
        client.close()


# Queues


class Endless(Listener):
    """A listener whose queue is filled as fast as it is emptied."""

    def accept(self) -> tuple[socket.socket, Any]:
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours, ""


def test_a_queue_is_taken_up_to_its_length_however_many_come() -> None:
    taken: list[None] = []
    poller = Poller()
    acceptor = Acceptor(
        poller,
        [Endless(socket.create_server(ANY_PORT))],
        taken,
        lambda request, *_: taken.append(request.close()),
        Tally(),
    )
    acceptor.take_queues()
    assert len(taken) == BACKLOG
    acceptor.stop()
    poller.close()


def test_accepting_works_without_the_private_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_accept", None)
    with serving(UpperServer(ANY_PORT)) as server, connected(server) as client:
        assert client.ask(b"hello") == b"HELLO"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_handshakes_are_looked_for_at_the_whole_address(host: str) -> None:
    """What is looked for is, in the state of a listening socket, found once: itself."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as one:
        port = one.getsockname()[1]
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.3", port)):
            assert sources(port, LISTEN).count(pack(host)) == 1
            assert not in_handshake(one)


# A loop iteration of a stopping server


def test_draining_answers_no_more_of_one_client_in_a_turn_than_serving() -> None:
    with UpperServer() as server:
        client, request = socket.socketpair()
        sent = b"a line of sixteen" * 16384 + b"\n"
        for one in (client, request):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(sent))
        client.sendall(sent)
        server.process_request(request, "")
        server.drain()
        turns = 0
        received = 0
        client.setblocking(False)
        while server.connections:
            with contextlib.suppress(BlockingIOError):
                while data := client.recv(1 << 20):
                    received += len(data)
                client.close()
                client = socket.socket()
            assert received <= (turns + 1) * RECEIVE_SIZE + len(sent) % RECEIVE_SIZE
            server.run_once()
            turns += 1
        client.close()
        assert received == len(sent)
        assert turns >= len(sent) // RECEIVE_SIZE


def test_second_drain_replaces_the_first() -> None:
    """It may follow when connections cannot be handed over while the server drains."""
    with UpperServer(config=Config(drain_timeout=60.0)) as server:
        before = list(server.poller.each)
        server.drain()
        second = server.drain()
        assert [call for call in server.poller.each if call not in before] == [second.step]


# A client whose machine has vanished

KEEPALIVE = """
import socket, subprocess, sys, threading, time
from outlive import listener
from tcpupperd import Config, UpperServer

config = Config(keepalive=float(sys.argv[1]), idle_timeout=0.0)
with UpperServer(("127.0.0.1", 0), config=config) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = socket.create_connection(server.server_address)
    client.sendall(b"hello\\n")
    assert client.recv(100) == b"HELLO\\n"
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    give_up_at = time.monotonic() + float(sys.argv[2])
    while server.connections and time.monotonic() < give_up_at:
        time.sleep(0.05)  # between two looks, up to the bound
    print(len(server.connections))
    server.shutdown()
"""


@pytest.fixture
def in_own_network() -> Callable[..., str]:
    """Runs a program in a network of its own, and returns what it prints."""
    shell = ["unshare", "--map-root-user", "--net", "sh", "-c"]
    set_up = "ip link set lo up"
    need("ip")
    if subprocess.run([*shell, set_up], check=False).returncode:
        cannot("no network namespace can be made (needs ip, of the package iproute2)")

    def run(program: str, *arguments: str) -> str:
        command = [*shell, f'{set_up} && exec "$0" -c "$@"', sys.executable, program, *arguments]
        return subprocess.run(
            command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=DEADLINE
        ).stdout

    return run


def test_client_that_vanishes_is_given_up(in_own_network: Callable[..., str]) -> None:
    assert in_own_network(KEEPALIVE, "1", "25") == "0\n"


def test_without_keepalive_no_probes_are_sent(in_own_network: Callable[..., str]) -> None:
    assert in_own_network(KEEPALIVE, "0", "7") == "1\n"


def test_keepalive_is_set_on_connections() -> None:
    with UpperServer(ANY_PORT, config=Config(keepalive=120.0)) as server, connected(server):
        server.handle_request()
        (connection,) = server.connections
        for level, option, value in listener.keepalive_options(120.0):
            assert connection.socket.getsockopt(level, option) == value
