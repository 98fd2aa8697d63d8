"""The lab: a far end that misbehaves on request, for those who test load balancers: sans I/O.

Each line is an order about the connection on which it arrives. Orders are carried out one after
the other, and nothing more is received while one is in progress. What is left of an order is an
order, too, so the state of a connection is a text: see `LabProtocol.left`.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tcpupperd.serving.protocol import Ending, Protocol

#: The maximum length of an order, in bytes; also how much is received in a loop iteration. A
#: client can therefore have as many pending orders as fit in twice this.
ORDER_MAX = 4096

#: The longest time that an order may take, in seconds.
LONGEST = 3600.0

#: The largest number of bytes that an order may ask for, and that an order may ask for that keeps
#: many of them in memory.
BYTES_MAX, HELD_BYTES_MAX = 2**30, 2**16

#: The bytes of a flood that are sent in a loop iteration, so that the other connections are served
#: in between.
CHUNK = 16384

#: The shortest time between two pieces of a drip, in seconds: 10,000 drips must not keep a worker
#: busy.
PIECE_INTERVAL = 0.5

#: What drip and flood send, over and over.
_ROW = b"." * 63 + b"\n"


class Order(NamedTuple):
    """A row of the table: how the order is written, and the most bytes it may ask for."""

    usage: str
    most: int = BYTES_MAX


ORDERS = {
    order.usage.partition(" ")[0]: order
    for order in (
        Order("who"),
        Order("echo TEXT"),
        Order("wait SECONDS TEXT"),
        Order("drip BYTES SECONDS", HELD_BYTES_MAX),
        Order("flood BYTES"),
        Order("stall [SECONDS]"),
        Order("half-close"),
        Order("close"),
        Order("reset"),
        Order("garbage BYTES [SEED]", HELD_BYTES_MAX),
    )
}

_ENDINGS = {"half-close": Ending.HALF_CLOSE, "close": Ending.CLOSE, "reset": Ending.RESET}


# Orders in progress: when to continue, what to send then, and what is left


class Wait(NamedTuple):
    """Sends a text later."""

    at: float
    text: bytes

    def step(self, now: float) -> tuple[bytes, InProgress | None]:
        """What to send now, and what remains of the order."""
        return answer(text=decoded(self.text)), None

    def left(self, now: float) -> bytes:
        """An order for what remains."""
        return b"wait %.3f %b\n" % (max(0.0, self.at - now), self.text)


class Stall(NamedTuple):
    """Only passes time, so that nothing is received."""

    at: float

    def step(self, now: float) -> tuple[bytes, InProgress | None]:
        """What to send now, and what remains of the order."""
        return b"", None

    def left(self, now: float) -> bytes:
        """An order for what remains."""
        return b"stall %.3f\n" % max(0.0, self.at - now)


class Drip(NamedTuple):
    """Sends bytes in pieces, at regular intervals."""

    at: float
    interval: float
    pieces: int
    size: int  # in bytes

    @classmethod
    def over(cls, seconds: float, size: int, now: float) -> Drip:
        """A drip of `size` bytes, the last of which is due in this many seconds."""
        pieces = max(1, min(size, int(seconds / PIECE_INTERVAL)))
        return cls(now + seconds / pieces, seconds / pieces, pieces, size)

    def step(self, now: float) -> tuple[bytes, InProgress | None]:
        """What to send now, and what remains of the order."""
        piece = math.ceil(self.size / self.pieces)
        rest = Drip(self.at + self.interval, self.interval, self.pieces - 1, self.size - piece)
        return filling(self.size, piece), rest if rest.size else None

    def left(self, now: float) -> bytes:
        """An order for what remains."""
        seconds = max(0.0, self.at - now + self.interval * (self.pieces - 1))
        return b"drip %d %.3f\n" % (self.size, seconds)


class Flood(NamedTuple):
    """Sends bytes as fast as the client reads them."""

    size: int
    at: float = 0.0

    def step(self, now: float) -> tuple[bytes, InProgress | None]:
        """What to send now, and what remains of the order."""
        piece = min(self.size, CHUNK)
        return filling(self.size, piece), Flood(self.size - piece) if self.size > piece else None

    def left(self, now: float) -> bytes:
        """An order for what remains."""
        return b"flood %d\n" % self.size


InProgress = Wait | Stall | Drip | Flood


class LabProtocol(Protocol):
    """Carries out orders, one step of one order at a time."""

    __slots__ = ("_current", "_who", "ending", "proceeds_at")

    service = "lab"
    receive_size = ORDER_MAX

    def __init__(self, who: Callable[[Any, float], Mapping[str, object]]) -> None:
        """`who` is called with a connection and the time; it returns the answer to `who`."""
        super().__init__()
        self._who = who
        self._current: InProgress | None = None
        self.ending = Ending.CLOSE
        self.proceeds_at: float | None = None

    def receive(self, data: bytes) -> bytes:
        """Keep the orders in `data`, which `proceed` carries out."""
        if not self.finished:
            self.held += data
            self._await_next()
        return b""

    def receive_eof(self) -> bytes:
        """Carry out a last line without a newline, too. End of file is read again afterwards."""
        if self.held:
            return self.receive(b"\n")
        self.finish()
        return b""

    def proceed(self, connection: Any, now: float) -> bytes:
        """Carry out one step of the current order, or begin the next one."""
        if self._current:
            sent, self._current = self._current.step(now)
        else:
            sent = self._begin_next(connection, now)
        if self._current:
            self.proceeds_at = self._current.at
        else:
            self.lines += 1
            self._await_next()
        return sent

    def finish(self) -> None:
        """Carry out nothing more."""
        self.held = b""
        self._current = None
        self.mid_line = False
        self.proceeds_at = None
        self.finished = True

    def left(self, now: float) -> bytes:
        """The orders that another process is to carry out instead."""
        return (self._current.left(now) if self._current else b"") + bytes(self.held)

    def resume(self, lines: int, mid_line: bool, held: bytes) -> bytes:
        """Continue where another process stopped."""
        self.lines = lines
        return self.receive(held)

    def _await_next(self) -> None:
        """Go on with the next order if it has been received."""
        is_ready = b"\n" in self.held or len(self.held) > ORDER_MAX
        self.proceeds_at = 0.0 if is_ready else None
        self.mid_line = bool(self.held) and not is_ready

    def _begin_next(self, connection: Any, now: float) -> bytes:
        line, _, self.held = bytes(self.held).partition(b"\n")
        try:
            name, arguments = parse(line.removesuffix(b"\r"))
        except ValueError as error:
            if len(line) > ORDER_MAX:  # its end may never arrive
                self.finish()
            usages = [order.usage for order in ORDERS.values()]
            return answer(error=str(error), orders=usages)
        return self._begin(name, arguments, connection, now)

    def _begin(self, name: str, arguments: list[Any], connection: Any, now: float) -> bytes:
        """Begin an order; return what to send immediately."""
        match name, arguments:
            case "who", _:
                return answer(**self._who(connection, now))
            case "echo", [text]:
                return answer(text=decoded(text))
            case "garbage", [size, seed]:
                return answer(bytes=size, seed=seed) + random.Random(seed).randbytes(size)
            case "wait", [seconds, text]:
                self._current = Wait(now + seconds, text)
            case "stall", [seconds]:
                self._current = Stall(now + seconds)
            case "drip", [size, seconds]:
                self._current = Drip.over(seconds, size, now)
            case "flood", [size]:
                self._current = Flood(size)
            case _:
                self.ending = _ENDINGS[name]
                self.finish()
        return b""


def parse(line: bytes) -> tuple[str, list[Any]]:
    """The name of an order and its arguments. Raises ValueError."""
    if len(line) > ORDER_MAX:
        raise ValueError(f"an order of more than {ORDER_MAX} bytes")
    word, _, rest = line.partition(b" ")
    order = ORDERS.get(name := decoded(word))
    if not order:
        raise ValueError(f'unknown order "{name}"')
    arguments = []
    for kind in order.usage.split()[1:]:
        word, _, rest = (rest, b"", b"") if kind == "TEXT" else rest.partition(b" ")
        arguments.append(_argument(kind, word, order))
    if rest:
        raise ValueError(f'unexpected "{decoded(rest)}" after "{order.usage}"')
    return name, arguments


def _argument(kind: str, word: bytes, order: Order) -> Any:
    """An argument of an order; one whose kind is in brackets may be missing."""
    match kind:
        case "TEXT":
            return word
        case "[SECONDS]" if not word:
            return LONGEST
        case "[SEED]" if not word:
            return random.getrandbits(32)
        case "SECONDS" | "[SECONDS]":
            if re.fullmatch(rb"[0-9]{1,4}(\.[0-9]{1,6})?", word) and float(word) <= LONGEST:
                return float(word)
            raise ValueError(f"{order.usage}: SECONDS must be a number from 0 to {LONGEST:g}")
    low, high = (0, 2**32 - 1) if kind == "[SEED]" else (1, order.most)
    if re.fullmatch(rb"[0-9]{1,10}", word) and low <= int(word) <= high:
        return int(word)
    noun = kind.strip("[]")
    raise ValueError(f"{order.usage}: {noun} must be a whole number from {low} to {high}")


def answer(**members: object) -> bytes:
    """An answer: a JSON object on a line of its own."""
    return json.dumps(members).encode() + b"\n"


def decoded(text: bytes) -> str:
    """A text that is sent back, or is part of an error."""
    return text.decode(errors="backslashreplace")


def filling(size: int, piece: int) -> bytes:
    """The first `piece` of the bytes that a drip or a flood has yet to send, of which the last one
    is a newline, wherever another process began."""
    start = -size % len(_ROW)
    return (_ROW * (piece // len(_ROW) + 2))[start : start + piece]
