"""`tcpupper --lab`: orders, answers of any length, and how the connection ends."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

from integration.daemon import Daemon
from integration.tcpupper import CLIENT, run, serving
from integration.terminal import Terminal
from waiting import DEADLINE, until


@pytest.fixture(scope="module")
def server() -> Iterator[list[str]]:
    """A daemon with a lab; the client's options for it."""
    with Daemon(listen=["127.0.0.1:0", "lab=127.0.0.1:0"], workers=1) as daemon:
        host, port = daemon.address_of("lab").split(":")
        yield ["--lab", "--host", host, "--port", port]


@pytest.mark.parametrize(
    ("order", "printed"),
    [
        (("echo", "hello", "there"), b'{"text": "hello there"}\n'),
        (("wait", "0.2", "hello"), b'{"text": "hello"}\n'),
        (("drip", "2", "0.2"), b".\n"),
        (("flood", "64"), b"." * 63 + b"\n"),
        (("stall", "0.2"), b""),
        (("garbage", "3", "5"), b'{"bytes": 3, "seed": 5}\n' + Random(5).randbytes(3)),
    ],
)
def test_order_is_carried_out(server: list[str], order: tuple[str, ...], printed: bytes) -> None:
    done = run(*server, *order)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, b"")


def test_who(server: list[str]) -> None:
    assert json.loads(run(*server, "who").stdout)["client"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("close", "closed the connection (0 bytes received)"),
        ("half-close", "closed the connection (0 bytes received)"),
        ("reset", "lost the connection to {}: Connection reset by peer (0 bytes received)"),
    ],
)
def test_end_of_the_connection_is_told(server: list[str], order: str, message: str) -> None:
    done = run(*server, order)
    assert done.returncode == 1
    assert message.format(f"127.0.0.1:{server[-1]}") in done.stderr.decode()


def test_orders_come_from_standard_input(server: list[str]) -> None:
    done = run(*server, stdin=b"echo a\nwait 0.1 b\nflood 64\necho c")
    lines = done.stdout.decode().splitlines()
    assert lines == ['{"text": "a"}', '{"text": "b"}', "." * 63, '{"text": "c"}']
    assert done.returncode == 0


def test_reset_after_orders_from_standard_input(server: list[str]) -> None:
    done = run(*server, stdin=b"flood 64\nstall 0.2\nreset\n")
    assert (done.returncode, len(done.stdout)) == (1, 64)
    assert b"Connection reset by peer (64 bytes received)" in done.stderr


def test_end_of_the_connection_before_all_orders_are_sent() -> None:
    exited = threading.Event()

    def close(connection: socket.socket) -> None:
        until(lambda: len(connection.recv(50_000, socket.MSG_PEEK)) == 50_000)
        connection.shutdown(socket.SHUT_WR)
        assert exited.wait(DEADLINE)

    with serving(close) as server:
        done = run("--lab", *server, stdin=b"who\n" * 10_000_000)
        exited.set()
    assert done.returncode == 1
    assert b"closed the connection (0 bytes received)" in done.stderr


def test_answer_that_looks_like_the_clients_own_is_printed() -> None:
    """And in pieces, as they come."""

    def answer(connection: socket.socket) -> None:
        received = b""
        while received.count(b"\n") < 2:
            received += connection.recv(100)
        token = received.split(b"\n")[1].removeprefix(b"echo ").decode()
        mark = f'{{"text": "{token}"}}\n'.encode()
        for piece in (mark[:12], b"x", mark[:5], mark[:9], mark[9:]):
            connection.sendall(piece)
            connection.sendall(b"")
        connection.recv(100)

    with serving(answer) as server:
        done = run("--lab", *server, "who")
    assert done.stdout == b'{"text": "tcx{"tex'
    assert done.returncode == 0


def test_server_that_does_not_know_orders_is_given_up() -> None:
    with Daemon() as daemon:
        host, port = daemon.addresses[0].split(":")
        where = ("--host", host, "--port", port)
        done = run("--lab", "--timeout", "0.5", *where, "who")
    assert (done.returncode, done.stdout[:4]) == (1, b"WHO\n")
    assert b"no answer from 127.0.0.1:" in done.stderr


@contextmanager
def conversation(server: list[str], status: int) -> Iterator[Terminal]:
    """The terminal of a conversation, which ends with this exit status."""
    with Terminal() as terminal, terminal.running([*CLIENT, *server]) as process:
        terminal.shows("^> $")
        yield terminal
        assert process.wait(DEADLINE) == status


def test_conversation(server: list[str]) -> None:
    with conversation(server, 1) as terminal:
        terminal.type("drip 3 1\r")
        terminal.shows("> drip 3 1\n..\n> $")
        terminal.type("what\r")
        terminal.shows('"unknown order .*\n> $')
        terminal.type("who\r")
        terminal.shows('{"host".*}\n> $')
        terminal.type("close\r")
        terminal.shows(r"closed the connection \(\d+ bytes received\)\n")


def test_conversation_ends_in_an_orderly_way(server: list[str]) -> None:
    with conversation(server, 0) as terminal:
        terminal.type("echo a\r")
        terminal.shows('{"text": "a"}\n> $')
        terminal.type("\x04")
