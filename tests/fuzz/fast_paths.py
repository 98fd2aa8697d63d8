"""The fast path at random: any bytes, split anywhere, short sends, resets; with the same results
in Python and in C.

    PYTHONPATH=.:tests python3 -m fuzz.fast_paths C_MODULE CASES [SEED]

A case is all that happens to one connection. The client's side says what an implementation should
have made of it, and that alone where the kernel may choose; where it may not, in Unix sockets
until a send is short, the two have to have done the same.
"""

import contextlib
import errno
import importlib.util
import random
import socket
import struct
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tcpupperd.config import Config
from tcpupperd.serving.connection import Connection, Limits, Next
from tcpupperd.serving.counters import Tally
from tcpupperd.serving.fast_path import ANSWERED, RECEIVE_SIZE, SENT, python_fast_path
from tcpupperd.serving.protocol import HELD_MAX, LineProtocol

FastPath = Callable[[int, Any, bytes], bytes | tuple[bytes, bytes] | int | None]
Step = tuple[str, Any]

#: Not `bytes.upper`, which is tested.
UPPER = bytes(byte - 32 if byte in range(ord("a"), ord("z") + 1) else byte for byte in range(256))

#: Sizes around those at which something changes: vectors, blocks, the receive size.
EDGES = (1, 15, 16, 17, 31, 32, 33, 239, 240, 241, 255, 256, 257, 479, 480, 481, 4096)
LARGE_EDGES = (RECEIVE_SIZE - 1, RECEIVE_SIZE, RECEIVE_SIZE + 1, 2 * RECEIVE_SIZE)
SEND_BUFFERS = (0, 0, 0, 1, 4096, 20_000)  # 0: as it is
DEADLINE = 30.0
RESET_AT_CLOSE = struct.pack("ii", 1, 0)


def c_fast_path(path: Path) -> FastPath:
    """The fast path of a module that was compiled to a file."""
    spec = importlib.util.spec_from_file_location("_fast_path", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fast_path: FastPath = module.fast_path
    return fast_path


def data_of(chance: random.Random) -> bytes:
    """What a client may send."""
    size = chance.choice(EDGES) if chance.random() < 0.7 else chance.randrange(1, 3000)
    if chance.random() < 0.03:
        size = chance.choice(LARGE_EDGES)
    data = bytearray(chance.randbytes(min(size, 500)) * (size // 500 + 1))[:size]
    kind = chance.random()
    if kind < 0.1:
        data[:] = b"\n" * size
    elif kind < 0.5:
        data[:] = bytes(data).translate(bytes(b"aZz{`\n \r"[byte % 8] for byte in range(256)))
    if chance.random() < 0.7:
        data[-1] = ord("\n")
    return bytes(data)


def steps_of(chance: random.Random) -> list[Step]:
    """What happens to one connection."""
    steps: list[Step] = []
    for _ in range(chance.randrange(1, 6)):
        steps += [("send", data_of(chance)) for _ in range(chance.choice((0, 1, 1, 1, 2)))]
        if chance.random() < 0.1:
            steps.append(chance.choice([("end", None), ("close", None), ("reset", None)]))
        steps += [("call", None)] * chance.choice((1, 1, 1, 2, 3))
        if chance.random() < 0.5:
            steps.append(("read", chance.randrange(1, 100_000)))
    return steps


class Case:
    """A connection, and what its client knows of it."""

    def __init__(self, fast_path: FastPath, *, tcp: bool, send_buffer: int) -> None:
        self.fast_path = fast_path
        self.tcp = tcp
        self.client, self.server = tcp_pair() if tcp else socket.socketpair()
        self.client.setblocking(False)
        self.server.setblocking(False)
        if send_buffer:
            self.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.counts = array("Q", [0, 0])
        self.coming = b""  # sent, and not received by the server
        self.held = b""  # of an incomplete line
        self.answers = b""  # that the client has to get
        self.read = b""
        self.ended = self.gone = self.short = False
        self.outcomes: list[object] = []  # as far as they follow from the steps

    def run(self, steps: list[Step]) -> None:
        """Take all steps until the connection has failed; check everything."""
        try:
            for name, value in steps:
                if getattr(self, f"do_{name}")(value):
                    break
            if not self.gone:
                self.read_all()
                assert self.read == self.answers
            assert self.counts[1] == len(self.answers)
        finally:
            self.do_reset(None)  # leaves no port behind that waits to be free again
            self.server.close()

    def do_send(self, data: bytes) -> None:
        if not self.ended and not self.gone:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                self.coming += data[: self.client.send(data)]

    def do_end(self, _: None) -> None:
        if not self.gone:
            self.client.shutdown(socket.SHUT_WR)
            self.ended = True

    def do_close(self, _: None) -> None:
        self.client.close()
        self.gone = True

    def do_reset(self, _: None) -> None:
        if not self.gone:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
            self.do_close(None)

    def do_read(self, size: int) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while not self.gone and size > 0 and (data := self.client.recv(min(size, 1 << 20))):
                self.read += data
                size -= len(data)

    def read_all(self) -> None:
        """Read what is due, which may take TCP a while, and what is not."""
        self.client.settimeout(DEADLINE)
        while len(self.read) < len(self.answers):
            self.read += self.client.recv(len(self.answers))
        self.client.setblocking(False)
        self.do_read(1)

    def do_call(self, _: None) -> bool:
        """Call the fast path, and say whether the connection is over."""
        before = self.counts[:]
        try:
            outcome = self.fast_path(self.server.fileno(), self.counts, self.held)
        except BlockingIOError as error:
            self.note(type(error))
            # TCP may not have brought it yet.
            assert self.tcp or not (self.coming or self.ended or self.gone)
            assert self.counts == before
            return False
        lines, sent = (after - was for after, was in zip(self.counts, before, strict=True))
        self.note(outcome, lines, sent)
        if isinstance(outcome, int):
            assert self.gone
            assert outcome in (errno.EPIPE, errno.ECONNRESET)
            assert sent == 0
            return True
        if outcome == b"":
            assert self.ended or self.gone
            assert not self.coming
            assert (lines, sent) == (0, 0)
            return True
        unsent, rest = outcome if isinstance(outcome, tuple) else (b"", outcome or b"")
        self.answered(unsent, rest, lines, sent)
        self.short = self.short or bool(unsent)
        return False

    def answered(self, unsent: bytes, rest: bytes, lines: int, sent: int) -> None:
        data = self.received(sent + len(unsent) + len(rest) - len(self.held))
        answer = self.held + data.translate(UPPER)
        end = answer.rfind(b"\n") + 1
        assert lines == len(data.split(b"\n")) - 1
        assert rest == answer[end:]
        assert unsent == answer[sent:end]
        self.answers += answer[:sent]
        self.held = rest if len(rest) <= HELD_MAX else b""

    def received(self, size: int) -> bytes:
        """This much of the expected data has arrived."""
        assert size == min(len(self.coming), RECEIVE_SIZE) or self.tcp
        assert size <= RECEIVE_SIZE
        data, self.coming = self.coming[:size], self.coming[size:]
        return data

    def note(self, *outcome: object) -> None:
        """Record the results that must be the same with any implementation."""
        if not self.tcp and not self.short:
            self.outcomes.append(outcome)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


def try_case(seed: int, *fast_paths: FastPath) -> None:
    """One case with each implementation."""
    chance = random.Random(seed)
    steps = steps_of(chance)
    tcp, send_buffer = chance.random() < 0.15, chance.choice(SEND_BUFFERS)
    outcomes = []
    for fast_path in fast_paths:
        case = Case(fast_path, tcp=tcp, send_buffer=send_buffer)
        case.run(steps)
        outcomes.append(case.outcomes)
    assert all(outcome == outcomes[0] for outcome in outcomes)


class Served:
    """A connection that is served, and its client; `fast_path` None is without any."""

    def __init__(self, fast_path: FastPath | None, config: Config, send_buffer: int) -> None:
        self.client, self.server = socket.socketpair()
        self.client.setblocking(False)
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * max(LARGE_EDGES))
        if send_buffer:
            self.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.tally = Tally(debug=fast_path is None)  # which takes the long way
        protocol = LineProtocol(config.max_line, config.lines_per_connection)
        limits = Limits.of(config)
        self.connection = Connection(self.server, "client", protocol, limits, self.tally)
        self.fast_path = fast_path
        self.read = b""

    def step(self, data: bytes, now: float) -> tuple[object, ...]:
        """Serve this input until nothing is left to do; the state after that."""
        if data:
            self.client.sendall(data)
        else:
            self.client.shutdown(socket.SHUT_WR)
        connection, following = self.connection, None
        with (
            mock.patch("tcpupperd.serving.connection.fast_path", self.fast_path),
            contextlib.suppress(BlockingIOError),
        ):
            while following is not Next.CLOSE:
                following = connection.handle(now) or following
                self.receive()
        counts, tally, protocol = self.tally.counts, self.tally, connection.protocol
        return (
            following is Next.CLOSE,
            self.read,
            *(protocol.lines, protocol.mid_line, bytes(protocol.held), protocol.finished),
            *(connection.line_began, connection.deadline(), connection.reason),
            *(counts[ANSWERED], counts[SENT] + tally.sent, counts[SENT] + tally.received),
        )

    def receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := self.client.recv(1 << 20):
                self.read += data


def try_connection(seed: int, *fast_paths: FastPath) -> None:
    """A stream that arrives in pieces, with each implementation and without any: everything that
    the client or an administrator can see is the same after each piece."""
    chance = random.Random(seed)
    config = Config(
        max_line=chance.choice((1, 16, 300, HELD_MAX, HELD_MAX + 1, 65_536)),
        lines_per_connection=chance.choice((0, 0, 0, 1, 50)),
        line_timeout=chance.choice((0.0, 5.0)),
        idle_timeout=chance.choice((0.0, 10.0)),
    )
    pieces = [data_of(chance) for _ in range(chance.randrange(1, 12))] + [b""]
    send_buffer = chance.choice(SEND_BUFFERS)
    served = [Served(fast_path, config, send_buffer) for fast_path in (None, *fast_paths)]
    try:
        for now, data in enumerate(pieces, 1):
            states = [one.step(data, float(now)) for one in served]
            assert all(state == states[0] for state in states), states
            if states[0][0]:
                break
    finally:
        for one in served:
            one.client.close()
            one.server.close()


def fuzz(fast_path: FastPath, cases: int, seed: int) -> None:
    """Try this many cases with an implementation and the reference."""
    for number in range(seed, seed + cases):
        try:
            try_case(number, fast_path, python_fast_path)
            if number % 10 == 0:
                try_connection(number, fast_path, python_fast_path)
        except AssertionError:
            print(f"case {number}", file=sys.stderr)
            raise


if __name__ == "__main__":
    first = int(sys.argv[3]) if sys.argv[3:] else random.randrange(2**32)
    print(f"from case {first}")
    fuzz(c_fast_path(Path(sys.argv[1])), int(sys.argv[2]), first)
