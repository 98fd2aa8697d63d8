"""Compares this server with the standard library's: for the same input, the same answer, byte for
byte."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from integration.embedding import ANY_PORT, serving
from tcpupperd.config import Config
from tcpupperd.serving.server import UpperServer
from waiting import DEADLINE


class LineHandler(socketserver.StreamRequestHandler):
    """What the documentation of `socketserver` makes of the stream handler."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class OnceHandler(socketserver.BaseRequestHandler):
    """What it makes of the plain handler: receive once, answer, close."""

    def handle(self) -> None:
        self.request.sendall(self.request.recv(65536).upper())


class ThreadingServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 100


class Step(NamedTuple):
    """A piece of the input; with `wait`, what is due is read before the next is sent."""

    data: bytes
    wait: bool


pieces = st.binary(min_size=1, max_size=200) | st.text("aé\n\r\0", min_size=1).map(str.encode)
conversations = st.lists(st.builds(Step, pieces, st.booleans()), max_size=12)


def converse(address: Any, steps: list[Step]) -> bytes:
    """All that a server answers; it must have answered each complete line before the next step
    that waits, or this fails."""
    answer = sent = b""
    with socket.create_connection(address, DEADLINE) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for step in steps:
            client.sendall(step.data)
            sent += step.data
            while step.wait and len(answer) < sent.rfind(b"\n") + 1:
                answer += receive(client)
        client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(EOFError):
            while True:
                answer += receive(client)
    return answer


def receive(client: socket.socket) -> bytes:
    data = client.recv(65536)
    if not data:
        raise EOFError
    return data


@pytest.fixture(scope="module")
def plain() -> Iterator[ThreadingServer]:
    with serving(ThreadingServer(ANY_PORT, LineHandler)) as server:
        yield server


@pytest.fixture(scope="module", params=[1, 16, 65536])
def ours(request: pytest.FixtureRequest) -> Iterator[UpperServer]:
    with serving(UpperServer(ANY_PORT, config=Config(max_line=request.param))) as server:
        yield server


@given(conversations)
@settings(deadline=None, max_examples=150)
def test_lines_are_answered_alike(
    plain: ThreadingServer, ours: UpperServer, steps: list[Step]
) -> None:
    expected = converse(plain.server_address, steps)
    assert expected == b"".join(step.data for step in steps).upper()
    assert converse(ours.server_address, steps) == expected


@pytest.fixture(scope="module")
def plain_once() -> Iterator[ThreadingServer]:
    with serving(ThreadingServer(ANY_PORT, OnceHandler)) as server:
        yield server


@pytest.fixture(scope="module")
def ours_once() -> Iterator[UpperServer]:
    config = Config(framing="none", lines_per_connection=1)
    with serving(UpperServer(ANY_PORT, config=config)) as server:
        yield server


@given(st.binary(max_size=4096))
@settings(deadline=None, max_examples=150)
def test_data_received_once_is_answered_alike(
    plain_once: ThreadingServer, ours_once: UpperServer, data: bytes
) -> None:
    steps = [Step(data, wait=False)] if data else []
    expected = converse(plain_once.server_address, steps)
    assert expected == data.upper()
    assert converse(ours_once.server_address, steps) == expected


def test_one_large_input_is_answered_alike(plain: ThreadingServer, ours: UpperServer) -> None:
    lines = b"".join(b"%d " % number * (number % 97) + b"\n" for number in range(20_000))
    assert pump(plain.server_address, lines) == pump(ours.server_address, lines) == lines.upper()


def pump(address: Any, data: bytes) -> bytes:
    """All that a server answers to more than the kernel's buffers hold: sent while it is read."""
    answer = b""

    def send() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    with socket.create_connection(address, DEADLINE) as client:
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        answer = client.makefile("rb").read()
        sender.join(DEADLINE)
    return answer
