"""The orders that a lab carries out, without a connection and with a clock of the test's own."""

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpupperd.serving.lab import (
    BYTES_MAX,
    CHUNK,
    HELD_BYTES_MAX,
    LONGEST,
    ORDER_MAX,
    ORDERS,
    PIECE_INTERVAL,
    LabProtocol,
    filling,
)
from tcpupperd.serving.protocol import Ending

USAGES = [order.usage for order in ORDERS.values()]

#: Orders that take their time, and what they send in all.
LASTING = [
    (b"wait 30 a text\n", b'{"text": "a text"}\n'),
    (b"drip 100 30\n", filling(100, 100)),
    (b"drip 65536 30\n", filling(65536, 65536)),
    (b"drip 1 30\n", b"\n"),
    (b"stall 30\n", b""),
    (b"flood 100000\n", filling(100000, 100000)),
]


class Lab:
    """A protocol with a clock, and all that it has sent."""

    def __init__(self, protocol: LabProtocol | None = None) -> None:
        self.protocol = protocol or LabProtocol(lambda connection, now: {"who": connection})
        self.now = 1000.0
        self.sent = b""

    def send(self, data: bytes) -> bytes:
        """What the lab sends in answer to this before it lets time pass."""
        before = len(self.sent)
        assert self.protocol.receive(data) == b""
        while self.protocol.proceeds_at is not None and self.protocol.proceeds_at <= self.now:
            self.step()
        return self.sent[before:]

    def step(self) -> None:
        """Let it proceed, when it wants to."""
        assert self.protocol.proceeds_at is not None
        self.now = max(self.now, self.protocol.proceeds_at)
        self.sent += self.protocol.proceed("me", self.now)

    def run(self) -> None:
        """Let it proceed until it waits for input."""
        while self.protocol.proceeds_at is not None:
            self.step()


def answer_to(order: bytes) -> Any:
    """The only answer to an order that takes no time."""
    sent = Lab().send(order + b"\n")
    assert sent.count(b"\n") == 1
    return json.loads(sent)


# Orders that take no time


def test_who_is_told_what_the_connection_is() -> None:
    assert answer_to(b"who") == {"who": "me"}


@pytest.mark.parametrize(
    ("text", "told"),
    [(b"a  b ", "a  b "), (b"", ""), ("grün".encode(), "grün"), (b'"\xff\0', '"\\xff\0')],
)
def test_echo(text: bytes, told: str) -> None:
    assert answer_to(b"echo " + text) == {"text": told}


def test_line_may_end_as_a_terminal_ends_it() -> None:
    assert answer_to(b"echo text\r") == {"text": "text"}


def test_last_line_need_not_end() -> None:
    lab = Lab()
    assert lab.send(b"who") == b""
    assert lab.protocol.mid_line
    lab.protocol.receive_eof()
    lab.run()
    assert json.loads(lab.sent) == {"who": "me"}
    assert not lab.protocol.finished
    lab.protocol.receive_eof()
    assert lab.protocol.finished


@pytest.mark.parametrize("size", [1, 10, HELD_BYTES_MAX])
def test_garbage_is_what_its_seed_says(size: int) -> None:
    for order in (b"garbage %d 5\n", b"garbage %d\n"):
        told, _, garbage = Lab().send(order % size).partition(b"\n")
        found = json.loads(told)
        assert found["bytes"] == len(garbage) == size
        assert garbage == random.Random(found["seed"]).randbytes(size)


def test_garbage_without_a_seed_differs() -> None:
    assert Lab().send(b"garbage 10\n") != Lab().send(b"garbage 10\n")


@pytest.mark.parametrize(
    ("order", "ending"),
    [
        (b"close", Ending.CLOSE),
        (b"half-close", Ending.HALF_CLOSE),
        (b"reset", Ending.RESET),
    ],
)
def test_ending_is_the_last_order(order: bytes, ending: Ending) -> None:
    lab = Lab()
    assert lab.send(b"echo a\n" + order + b"\nwho\n") == b'{"text": "a"}\n'
    assert lab.protocol.finished
    assert lab.protocol.ending is ending
    assert lab.send(b"who\n") == b""
    assert lab.protocol.lines == 2


# Orders that are none


@pytest.mark.parametrize(
    ("order", "error"),
    [
        (b"", 'unknown order ""'),
        (b"WHO", 'unknown order "WHO"'),
        (b"\xff\n"[:1], 'unknown order "\\xff"'),
        (b"GET / HTTP/1.1", 'unknown order "GET"'),
        (b"who else", 'unexpected "else" after "who"'),
        (b"flood 1 2", 'unexpected "2" after "flood BYTES"'),
        (b"wait", "SECONDS must be a number from 0 to 3600"),
        (b"wait  1 a", "SECONDS must be a number from 0 to 3600"),
        (b"wait 3600.1 a", "SECONDS must be a number from 0 to 3600"),
        (b"wait -1 a", "SECONDS must be a number from 0 to 3600"),
        (b"wait nan a", "SECONDS must be a number from 0 to 3600"),
        (b"wait 1e3 a", "SECONDS must be a number from 0 to 3600"),
        (b"stall soon", "SECONDS must be a number from 0 to 3600"),
        (b"drip 10", "SECONDS must be a number from 0 to 3600"),
        (b"flood", "BYTES must be a whole number from 1 to 1073741824"),
        (b"flood 0", "BYTES must be a whole number from 1 to 1073741824"),
        (b"flood %d" % (BYTES_MAX + 1), "BYTES must be a whole number from 1 to 1073741824"),
        (b"flood " + b"9" * 4000, "BYTES must be a whole number from 1 to 1073741824"),
        (b"drip 65537 1", "BYTES must be a whole number from 1 to 65536"),
        (b"garbage 65537", "BYTES must be a whole number from 1 to 65536"),
        (b"garbage 1 -1", "SEED must be a whole number from 0 to 4294967295"),
    ],
)
def test_invalid_order_is_answered_with_those_that_exist(order: bytes, error: str) -> None:
    found = answer_to(order)
    assert found["error"].endswith(error)
    assert found["orders"] == USAGES


def test_invalid_order_ends_nothing() -> None:
    assert Lab().send(b"what\necho a\n").endswith(b'{"text": "a"}\n')


def test_order_that_is_too_long_ends_the_connection() -> None:
    assert Lab().send(b"echo %b\n" % (b"x" * (ORDER_MAX - 5))).startswith(b'{"text": "xx')
    lab = Lab()
    assert b"more than 4096 bytes" in lab.send(b"x" * (ORDER_MAX + 1))
    assert lab.protocol.finished


@given(st.binary(max_size=40), st.sampled_from(list(ORDERS)))
def test_anything_is_an_order_or_an_error(line: bytes, name: str) -> None:
    lab = Lab()
    lab.send(line + b"\n" + name.encode() + b" " + line)
    assert not lab.protocol.held or lab.protocol.mid_line or lab.protocol.proceeds_at is not None


# Orders that take their time


def test_text_comes_when_it_is_due() -> None:
    lab = Lab()
    assert lab.send(b"wait 1.5 a\n") == b""
    assert lab.protocol.proceeds_at == 1001.5
    lab.step()
    assert lab.sent == b'{"text": "a"}\n'


def test_drip_is_spread_over_its_time() -> None:
    lab = Lab()
    lab.send(b"drip 10 5\n")
    moments = []
    while lab.protocol.proceeds_at is not None:
        lab.step()
        moments.append((lab.now - 1000, len(lab.sent)))
    assert moments == [(0.5 * count, count) for count in range(1, 11)]


@pytest.mark.parametrize(("size", "seconds"), [(65536, 3600), (3, 3600), (100, 0.2), (7, 2.3)])
def test_pieces_of_a_drip_are_not_too_many(size: int, seconds: float) -> None:
    lab = Lab()
    lab.send(b"drip %d %.1f\n" % (size, seconds))
    pieces = 0
    while lab.protocol.proceeds_at is not None:
        lab.step()
        pieces += 1
    assert pieces <= max(1, seconds / PIECE_INTERVAL)
    assert lab.now - 1000 == pytest.approx(seconds)
    assert lab.sent == filling(size, size)


def test_flood_is_sent_in_chunks_as_soon_as_there_is_room() -> None:
    lab = Lab()
    lab.protocol.receive(b"flood 100000\n")
    sizes = []
    while lab.protocol.proceeds_at == 0:
        before = len(lab.sent)
        lab.step()
        sizes.append(len(lab.sent) - before)
    assert sizes == [0, *[CHUNK] * 6, 100000 - 6 * CHUNK]
    assert lab.sent == filling(100000, 100000)


def test_what_is_sent_is_lines() -> None:
    assert re.fullmatch(rb"\.{35}\n(\.{63}\n){15}", filling(996, 996))
    assert filling(1, 1) == b"\n"


def test_stall_without_a_time_is_the_longest() -> None:
    lab = Lab()
    lab.send(b"stall\nwho\n")
    assert lab.protocol.proceeds_at == 1000 + LONGEST
    lab.run()
    assert json.loads(lab.sent) == {"who": "me"}


def test_next_order_waits_for_the_one_before() -> None:
    lab = Lab()
    assert lab.send(b"wait 1 a\nwho\n") == b""
    lab.run()
    assert lab.sent == b'{"text": "a"}\n{"who": "me"}\n'
    assert lab.now == 1001
    assert lab.protocol.lines == 2


def test_one_step_is_one_order() -> None:
    """So that a client that sends many has no more than its share of a worker's time."""
    lab = Lab()
    lab.protocol.receive(b"echo a\n" * 1000)
    lab.step()
    assert lab.sent == b'{"text": "a"}\n'
    assert lab.protocol.proceeds_at == 0


@pytest.mark.parametrize(("order", "sent"), LASTING)
@pytest.mark.parametrize("steps", range(6))
def test_another_process_continues(order: bytes, sent: bytes, steps: int) -> None:
    """At any moment, with the time and the bytes that are left."""
    lab = Lab()
    lab.send(b"echo a\n" + order + b"echo b\nhalf an or")
    for _ in range(steps):
        if lab.protocol.proceeds_at is not None:
            lab.step()
    lab.now += 0.1
    assert lab.protocol.left(lab.now).count(b"\n") <= 2

    heir = Lab()
    heir.now, heir.sent = lab.now, lab.sent
    left = lab.protocol.left(lab.now)
    assert heir.protocol.resume(lab.protocol.lines, lab.protocol.mid_line, left) == b""
    heir.run()
    assert heir.sent == b'{"text": "a"}\n' + sent + b'{"text": "b"}\n'
    assert heir.protocol.lines == 3
    assert heir.protocol.mid_line
    if not order.startswith(b"flood"):
        assert heir.now == pytest.approx(max(1030, lab.now), abs=0.2)


def test_finish_drops_what_is_left() -> None:
    lab = Lab()
    lab.send(b"wait 1 a\nwho\n")
    lab.protocol.finish()
    assert lab.protocol.proceeds_at is None
    assert lab.protocol.left(lab.now) == b""
    assert lab.send(b"who\n") == b""
