"""The client's answers to what it sends, however the bytes are split."""

import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol, count_lines

CASES = [
    (b"", b""),
    (b"\n", b"\n"),
    (b"\n\n\n", b"\n\n\n"),
    (b"hello\n", b"HELLO\n"),
    (b"hello\r\nworld\r\n", b"HELLO\r\nWORLD\r\n"),
    (b"one\ntwo", b"ONE\nTWO"),
    (b"no newline at all", b"NO NEWLINE AT ALL"),
    (b"MiXeD 123 [{`@\n", b"MIXED 123 [{`@\n"),
    (b"nul\0 and \x7f\n", b"NUL\0 AND \x7f\n"),
    ("grüße, ŝ, ß, 日本\n".encode(), "GRüßE, ŝ, ß, 日本\n".encode()),
    (b"\xff\xfe\x80 not utf-8\n", b"\xff\xfe\x80 NOT UTF-8\n"),
    (b"a longer line than any other here: " + b"xyz " * 8 + b"\n" + b"tail", None),
]

chunks = st.lists(st.text("ab\r\n").map(str.encode) | st.binary(max_size=40), max_size=20).map(
    lambda found: [chunk for chunk in found if chunk]
)
line_limits = st.sampled_from([1, 2, 7, 64, 65536])


def answer(protocol: LineProtocol | ChunkProtocol, chunks: Iterable[bytes]) -> bytes:
    """All that a client gets that sends these chunks and ends its input."""
    return b"".join(map(protocol.receive, filter(None, chunks))) + protocol.receive_eof()


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def lines_of(data: bytes) -> list[bytes]:
    """Its lines with their newlines; `bytes.splitlines` would also split at \\r."""
    *complete, last = data.split(b"\n")
    return [line + b"\n" for line in complete] + ([last] if last else [])


@pytest.mark.parametrize("max_line", [1, 8, 65536])
@pytest.mark.parametrize(("sent", "expected"), CASES)
def test_answer_is_the_same_at_every_split(
    sent: bytes, expected: bytes | None, max_line: int
) -> None:
    expected = sent.upper() if expected is None else expected
    assert answer(LineProtocol(max_line), [sent]) == expected
    assert answer(LineProtocol(max_line), bytewise(sent)) == expected
    for at in range(len(sent)):
        assert answer(LineProtocol(max_line), [sent[:at], sent[at:]]) == expected


@given(chunks, line_limits)
def test_any_bytes_are_answered_upper_cased(chunks: list[bytes], max_line: int) -> None:
    assert answer(LineProtocol(max_line), chunks) == b"".join(chunks).upper()


@given(chunks)
def test_each_line_is_answered_when_its_newline_has_come(chunks: list[bytes]) -> None:
    protocol = LineProtocol(65536)
    received = answered = b""
    for chunk in chunks:
        received += chunk
        answered += protocol.receive(chunk)
        complete = received[: received.rfind(b"\n") + 1]
        assert answered == complete.upper()
        assert protocol.held == received[len(complete) :].upper()
        assert protocol.lines == complete.count(b"\n")
        assert protocol.mid_line == (len(received) > len(complete))


def test_final_line_counts_though_it_has_no_newline() -> None:
    protocol = LineProtocol(10)
    assert answer(protocol, [b"one\ntwo"]) == b"ONE\nTWO"
    assert protocol.lines == 2
    assert protocol.finished
    assert not protocol.mid_line


@given(chunks, line_limits)
def test_no_more_than_max_line_is_ever_held(chunks: list[bytes], max_line: int) -> None:
    protocol = LineProtocol(max_line)
    for chunk in chunks:
        protocol.receive(chunk)
        assert len(protocol.held) <= max_line


def test_line_is_answered_in_pieces_once_it_is_longer_than_max_line() -> None:
    protocol = LineProtocol(4)
    assert protocol.receive(b"abcd") == b""
    assert protocol.receive(b"e") == b"ABCDE"
    assert protocol.mid_line
    assert protocol.lines == 0
    assert protocol.receive(b"f\n") == b"F\n"
    assert protocol.lines == 1
    assert not protocol.mid_line


@given(chunks, line_limits, st.integers(1, 4))
def test_nothing_is_answered_after_the_last_line(
    chunks: list[bytes], max_line: int, limit: int
) -> None:
    protocol = LineProtocol(max_line, lines_per_connection=limit)
    sent = b"".join(chunks)
    assert answer(protocol, chunks) == b"".join(lines_of(sent)[:limit]).upper()
    assert protocol.lines <= limit


def test_last_line_finishes_the_protocol_immediately() -> None:
    protocol = LineProtocol(10, lines_per_connection=2)
    assert protocol.receive(b"one\n") == b"ONE\n"
    assert not protocol.finished
    assert protocol.receive(b"two\nthree\n") == b"TWO\n"
    assert protocol.finished
    assert protocol.receive(b"four\n") == b""
    assert (protocol.held, protocol.mid_line, protocol.lines) == (b"", False, 2)


@given(chunks, st.data(), line_limits, line_limits, st.integers(0, 3))
def test_to_resume_is_the_same_as_not_to_have_stopped(
    chunks: list[bytes], data: st.DataObject, before: int, after: int, limit: int
) -> None:
    at = data.draw(st.integers(0, len(chunks)))
    stopped = LineProtocol(before, limit)
    early = b"".join(map(stopped.receive, chunks[:at]))
    resumed = LineProtocol(after, limit)
    early += resumed.resume(stopped.lines, stopped.mid_line, bytes(stopped.held))
    assert len(resumed.held) <= after
    assert (resumed.lines, resumed.finished) == (stopped.lines, stopped.finished)
    assert resumed.mid_line == stopped.mid_line
    assert early + answer(resumed, chunks[at:]) == answer(LineProtocol(before, limit), chunks)


def test_resumed_connection_may_have_had_more_lines_than_are_allowed_now() -> None:
    protocol = LineProtocol(10, lines_per_connection=2)
    assert protocol.resume(5, True, b"half a li") == b""
    assert protocol.finished
    assert answer(protocol, [b"ne\n"]) == b""


def test_finish_drops_an_unfinished_line() -> None:
    protocol = LineProtocol(10)
    protocol.receive(b"half")
    protocol.finish()
    assert (protocol.held, protocol.mid_line) == (b"", False)
    assert answer(protocol, [b" a line\n"]) == b""


def test_long_line_in_small_pieces_costs_its_length_not_its_square() -> None:
    def cost(pieces: int) -> float:
        protocol = LineProtocol(1 << 20)
        began = time.process_time()
        for _ in range(pieces):
            protocol.receive(b"x" * 16)
        return time.process_time() - began

    # The square would be 256 times as much.
    assert min(cost(32000) for _ in range(3)) < 64 * min(cost(2000) for _ in range(3))


@given(chunks)
def test_chunks_are_answered_immediately(chunks: list[bytes]) -> None:
    protocol = ChunkProtocol()
    for chunk in chunks:
        assert protocol.receive(chunk) == chunk.upper()
        assert (protocol.held, protocol.mid_line) == (b"", False)
    assert protocol.lines == len(chunks)
    assert not protocol.finished
    assert protocol.receive_eof() == b""
    assert protocol.finished


@given(chunks, st.integers(1, 3))
def test_chunks_beyond_the_limit_are_not_answered(chunks: list[bytes], limit: int) -> None:
    protocol = ChunkProtocol(lines_per_connection=limit)
    assert answer(protocol, chunks) == b"".join(chunks[:limit]).upper()


def test_chunks_continue_after_another_framing_held_something() -> None:
    protocol = ChunkProtocol(lines_per_connection=3)
    assert protocol.resume(1, True, b"half a li") == b"HALF A LI"
    assert answer(protocol, [b"ne\n", b"more\n", b"too much\n"]) == b"NE\nMORE\n"


@given(st.binary())
def test_lines_are_counted(data: bytes) -> None:
    assert count_lines(data) == data.count(b"\n")
