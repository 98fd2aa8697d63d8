"""Turns at random: any bytes, split anywhere, short sends, resets; with the same results in Python
and in C.

    PYTHONPATH=.:tests python3 -m fuzz.turns C_MODULE CASES [SEED]

A case is all that happens to one connection. The client's side says what an implementation should
have made of it, and that alone where the kernel may choose; where it may not, in Unix sockets
until a send is short, the two have to have done the same.
"""

import contextlib
import importlib.util
import random
import socket
import struct
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcpupperd.serving.turn import RECEIVE_SIZE, python_turn

Turn = Callable[[int, Any], tuple[bool, bytes] | None]
Step = tuple[str, Any]

#: Not `bytes.upper`, which is tested.
UPPER = bytes(byte - 32 if byte in range(ord("a"), ord("z") + 1) else byte for byte in range(256))

#: Sizes around those at which something changes: vectors, blocks, the receive size.
EDGES = (1, 15, 16, 17, 31, 32, 33, 239, 240, 241, 255, 256, 257, 479, 480, 481, 4096)
LARGE_EDGES = (RECEIVE_SIZE - 1, RECEIVE_SIZE, RECEIVE_SIZE + 1, 2 * RECEIVE_SIZE)
SEND_BUFFERS = (0, 0, 0, 1, 4096, 20_000)  # 0: as it is
DEADLINE = 30.0
RESET_AT_CLOSE = struct.pack("ii", 1, 0)


def c_turn(path: Path) -> Turn:
    """The turn of a module that was compiled to a file."""
    spec = importlib.util.spec_from_file_location("_turn", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    turn: Turn = module.turn
    return turn


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
        steps += [("turn", None)] * chance.choice((1, 1, 1, 2, 3))
        if chance.random() < 0.5:
            steps.append(("read", chance.randrange(1, 100_000)))
    return steps


class Case:
    """A connection, and what its client knows of it."""

    def __init__(self, turn: Turn, *, tcp: bool, send_buffer: int) -> None:
        self.turn = turn
        self.tcp = tcp
        self.client, self.server = tcp_pair() if tcp else socket.socketpair()
        self.client.setblocking(False)
        self.server.setblocking(False)
        if send_buffer:
            self.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.counts = array("Q", [0, 0])
        self.coming = b""  # sent, and not received by the server
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

    def do_turn(self, _: None) -> bool:
        """Take a turn, and say whether the connection has failed."""
        before = self.counts[:]
        try:
            outcome = self.turn(self.server.fileno(), self.counts)
        except BlockingIOError as error:
            self.note(type(error))
            # TCP may not have brought it yet.
            assert self.tcp or not (self.coming or self.ended or self.gone)
            assert self.counts == before
            return False
        except (BrokenPipeError, ConnectionResetError) as error:
            self.note(type(error), self.counts[0] - before[0])
            assert self.gone
            assert self.counts[1] == before[1]
            return True
        lines, sent = (after - was for after, was in zip(self.counts, before, strict=True))
        if outcome is not None and not outcome[0]:
            self.handed_back(outcome[1], lines, sent)
            return not outcome[1]
        self.answered(b"" if outcome is None else outcome[1], lines, sent)
        self.short = self.short or outcome is not None
        self.note(outcome, lines, sent)
        return False

    def handed_back(self, data: bytes, lines: int, sent: int) -> None:
        self.note(data)
        assert (lines, sent) == (0, 0)
        assert self.received(len(data)) == data
        assert not data.endswith(b"\n")
        assert data or ((self.ended or self.gone) and not self.coming)

    def answered(self, rest: bytes, lines: int, sent: int) -> None:
        data = self.received(sent + len(rest))
        assert data.endswith(b"\n")
        assert lines == len(data.split(b"\n")) - 1
        answer = data.translate(UPPER)
        assert answer[sent:] == rest
        self.answers += answer[:sent]

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


def try_case(seed: int, *turns: Turn) -> None:
    """One case with each implementation."""
    chance = random.Random(seed)
    steps = steps_of(chance)
    tcp, send_buffer = chance.random() < 0.15, chance.choice(SEND_BUFFERS)
    outcomes = []
    for turn in turns:
        case = Case(turn, tcp=tcp, send_buffer=send_buffer)
        case.run(steps)
        outcomes.append(case.outcomes)
    assert all(outcome == outcomes[0] for outcome in outcomes)


def fuzz(turn: Turn, cases: int, seed: int) -> None:
    """Try this many cases with an implementation and the reference."""
    for number in range(seed, seed + cases):
        try:
            try_case(number, turn, python_turn)
        except AssertionError:
            print(f"case {number}", file=sys.stderr)
            raise


if __name__ == "__main__":
    first = int(sys.argv[3]) if sys.argv[3:] else random.randrange(2**32)
    print(f"from case {first}")
    fuzz(c_turn(Path(sys.argv[1])), int(sys.argv[2]), first)
