"""An unsent answer is sent piece by piece from one buffer, so the work is linear."""

import contextlib
import math
import socket
from collections.abc import Callable, Iterator

import pytest

from tcpupperd.serving.connection import Connection, Limits, Next, State
from tcpupperd.serving.counters import Tally
from tcpupperd.serving.http import HttpProtocol, Page
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol, Protocol

NOW = 1e6

#: More than the kernel accepts at a time.
SIZE = 1_000_000

#: A connection, and the client's end of it.
Pair = tuple[Connection, socket.socket]


@pytest.fixture
def connect() -> Iterator[Callable[[Protocol], Pair]]:
    """Makes a connection with a protocol."""
    sockets: list[socket.socket] = []

    def make(protocol: Protocol) -> Pair:
        server, client = socket.socketpair()
        sockets.extend((server, client))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        never = Limits(math.inf, math.inf, math.inf, math.inf, math.inf)
        return Connection(server, "", protocol, never, Tally()), client

    yield make
    for one in sockets:
        one.close()


def upper(framing: str, opening: bytes = b"") -> Protocol:
    return ChunkProtocol(0, opening) if framing == "none" else LineProtocol(SIZE, 0, opening)


def read_all(connection: Connection, client: socket.socket) -> bytes:
    """Read the whole answer; all that was unsent is sent from one buffer."""
    buffer, answer = connection.unsent.obj, bytearray()
    client.setblocking(False)
    while connection.unsent:
        assert connection.unsent.obj is buffer
        with contextlib.suppress(BlockingIOError):
            connection.handle(NOW)
        with contextlib.suppress(BlockingIOError):
            while data := client.recv(2**16):
                answer += data
    return bytes(answer)


@pytest.mark.parametrize("framing", ["line", "none"])
@pytest.mark.parametrize(
    "state",
    [
        State(unsent=b"X" * SIZE),
        State(held=b"X" * (SIZE + 1), mid_line=True),
        State(unsent=b"X" * SIZE, held=b"X" * (SIZE + 1), mid_line=True),
    ],
    ids=["unsent", "held", "both"],
)
def test_after_a_handover(connect: Callable[[Protocol], Pair], framing: str, state: State) -> None:
    connection, client = connect(upper(framing))
    connection.restore(state, NOW)
    assert connection.resume(NOW) is Next.WATCH
    assert read_all(connection, client) == state.unsent + state.held


@pytest.mark.parametrize("framing", ["line", "none"])
@pytest.mark.parametrize("first", [b"", b"x"], ids=["lines", "rest of a line"])
def test_of_an_answer(connect: Callable[[Protocol], Pair], framing: str, first: bytes) -> None:
    connection, client = connect(upper(framing))
    if first:
        client.send(first)
        connection.handle(NOW)
    client.send(b"x" * 50_000 + b"\n")
    assert connection.handle(NOW) is Next.WATCH
    assert read_all(connection, client) == first.upper() + b"X" * 50_000 + b"\n"


def test_of_a_page(connect: Callable[[Protocol], Pair]) -> None:
    connection, client = connect(HttpProtocol({b"/": lambda: Page("text/plain", "x" * SIZE)}))
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert connection.handle(NOW) is Next.WATCH
    assert len(read_all(connection, client)) > SIZE


def test_of_a_greeting(connect: Callable[[Protocol], Pair]) -> None:
    connection, client = connect(upper("line", b"X" * SIZE))
    assert connection.open(NOW) is Next.WATCH
    assert read_all(connection, client) == b"X" * SIZE
