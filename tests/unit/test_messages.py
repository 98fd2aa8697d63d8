"""Log messages: their form, and that they never hold up the daemon."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from tcpupperd.host import messages
from tcpupperd.host.messages import LINE_MAX, StreamHandler, is_journal
from waiting import DEADLINE


class Pipe:
    """A pipe with a handler that writes to it."""

    def __init__(self, *, prefixed: bool) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.handler = StreamHandler(self.writer, prefixed=prefixed)

    def read(self) -> list[str]:
        """The lines written since the last time."""
        found = b""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reader, 65536):
                found += data
        assert not found or found.endswith(b"\n")
        return found.decode().splitlines()

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe(prefixed=True)
    yield pipe
    pipe.close()


def message(text: object, *values: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("tcpupperd", level, __file__, 1, text, values, None)


def failure() -> logging.LogRecord:
    """A record with a traceback."""
    try:
        raise ValueError("first line\nsecond line")
    except ValueError as error:
        found = (ValueError, error, error.__traceback__)
        return logging.LogRecord("tcpupperd", logging.ERROR, __file__, 1, "bug", (), found)


def emit_all(handler: logging.Handler, *records: logging.LogRecord) -> None:
    """Emit within a time that only a write that waits can exceed."""

    def emit() -> None:
        for record in records:
            handler.emit(record)

    thread = threading.Thread(target=emit, daemon=True)  # where it hangs, the run must not
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), "a log message waits"


# Form


@pytest.mark.parametrize(
    ("level", "prefix"),
    [
        (logging.DEBUG, "<7>"),
        (logging.INFO, "<6>"),
        (logging.WARNING, "<4>"),
        (logging.ERROR, "<3>"),
        (logging.CRITICAL, "<2>"),
        (15, "<6>"),
    ],
)
def test_journal_gets_the_priority(pipe: Pipe, level: int, prefix: str) -> None:
    pipe.handler.emit(message("hello %s", "world", level=level))
    assert pipe.read() == [f"{prefix}hello world"]


def test_every_line_of_a_traceback_has_the_priority(pipe: Pipe) -> None:
    pipe.handler.emit(failure())
    lines = pipe.read()
    assert lines[:2] == ["<3>bug", "<3>Traceback (most recent call last):"]
    assert lines[-2:] == ["<3>ValueError: first line", "<3>second line"]
    assert all(line.startswith("<3>") for line in lines)


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\r", "\x0b", "\x1c", "\u2028"])
def test_no_line_can_be_forged(pipe: Pipe, separator: str) -> None:
    pipe.handler.emit(message("name %s", f"x{separator}<0>forged"))
    assert pipe.read() == ["<6>name x", "<6><0>forged"]


def test_terminal_gets_time_and_level() -> None:
    pipe = Pipe(prefixed=False)
    pipe.handler.emit(message("hello", level=logging.WARNING))
    (line,) = pipe.read()
    assert line.endswith(" WARNING hello")
    assert not line.startswith("<")
    pipe.close()


def test_invalid_utf8_is_escaped(pipe: Pipe) -> None:
    pipe.handler.emit(message("caf\udce9 grüße"))
    assert pipe.read() == ["<6>caf\\udce9 grüße"]


def test_long_line_is_shortened_to_an_atomic_write_to_a_pipe(pipe: Pipe) -> None:
    pipe.handler.emit(message("x" * 10000))
    assert pipe.read() == ["<6>" + "x" * (LINE_MAX - 4)]


def test_message_that_cannot_be_formatted_is_still_told(pipe: Pipe) -> None:
    pipe.handler.emit(message("%d lines", "many"))
    assert pipe.read() == ["<6>bug: a message that cannot be formatted: '%d lines' ('many',)"]


# Whether it is the journal


def test_journal_is_known_by_device_and_inode() -> None:
    one, other = socket.socketpair()
    with one, other:
        status = os.fstat(one.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert is_journal(one.fileno(), environ)
        # The variable is inherited, and the stream may lead elsewhere by now.
        assert not is_journal(other.fileno(), environ)
        assert not is_journal(one.fileno(), {})
        for text in ("", ":", "8:1", "nonsense"):
            assert not is_journal(one.fileno(), {"JOURNAL_STREAM": text})
    assert not is_journal(one.fileno(), environ)


# Never in the way


def test_full_pipe_drops_messages_and_tells_how_many(pipe: Pipe) -> None:
    emit_all(pipe.handler, *(message("%05d " + "x" * 100, number) for number in range(1000)))
    written = pipe.read()
    assert 0 < len(written) < 1000
    assert [line[3:8] for line in written] == [f"{number:05}" for number in range(len(written))]
    emit_all(pipe.handler, message("again"), message("and again"))
    told = f"<4>{1000 - len(written)} messages dropped"
    assert pipe.read() == [told, "<6>again", "<6>and again"]


def test_full_socket_drops_messages_and_tells_how_many() -> None:
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        handler = StreamHandler(writer.fileno(), prefixed=True)
        emit_all(handler, *(message("x" * 4000) for _ in range(1000)))
        written = read_all(reader).count(b"\n")
        assert 0 < written < 1000
        emit_all(handler, message("again"))
        assert read_all(reader) == b"<4>%d messages dropped\n<6>again\n" % (1000 - written)


def read_all(reader: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(BlockingIOError):
        while data := reader.recv(1 << 20):
            found += data
    return found


def test_the_reader_may_have_exited(pipe: Pipe) -> None:
    os.close(pipe.reader)
    pipe.reader = -1
    emit_all(pipe.handler, message("lost"), failure())
    assert pipe.handler._dropped == 2


def test_the_descriptor_may_be_closed(pipe: Pipe) -> None:
    os.close(pipe.writer)
    emit_all(pipe.handler, message("lost"), failure())
    assert pipe.handler._dropped == 2


def test_there_may_be_no_descriptor_from_the_start() -> None:
    pipe = Pipe(prefixed=True)
    pipe.close()
    emit_all(StreamHandler(pipe.writer, prefixed=True), message("lost"))


def test_the_disk_may_be_full() -> None:
    with open("/dev/full", "w") as full:
        handler = StreamHandler(full.fileno(), prefixed=False)
        emit_all(handler, message("lost"), failure())
        assert handler._dropped == 2


def test_level_can_be_changed() -> None:
    root = logging.getLogger()
    before = root.level
    try:
        messages.set_level("debug")
        assert root.level == logging.DEBUG
        messages.set_level("error")
        assert not root.isEnabledFor(logging.WARNING)
    finally:
        root.setLevel(before)
