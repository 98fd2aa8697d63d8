"""Entries of the journal: their form, and that they never hold up the daemon."""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entries import Entries, decode
from outlive.memfd import SEALS, sealed
from tcpupperd.events import Event, fields
from tcpupperd.host import journal
from tcpupperd.host.journal import Journal, encode
from tcpupperd.host.messages import FLUSH_TIME, JournalHandler
from unit.test_messages import Pipe, emit_all, failure, message
from waiting import until

#: More than any socket takes in a datagram.
HUGE = "x" * (16 << 20)


@pytest.fixture
def no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To be requested before the handler, which looks for the journal when it is created."""
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "none"))


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Entries]:
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "socket"))
    with Entries(tmp_path / "socket") as entries:
        yield entries


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe(prefixed=True)
    yield pipe
    pipe.close()


@pytest.fixture
def handler(pipe: Pipe) -> Iterator[JournalHandler]:
    with contextlib.closing(JournalHandler(pipe.handler)) as handler:
        handler.about_dropped = Event.MESSAGES_DROPPED.fields()
        yield handler


@pytest.fixture
def sender() -> Iterator[Journal]:
    with contextlib.closing(Journal()) as sender:
        yield sender


# The protocol

NAMES = st.from_regex(r"[A-Z][A-Z0-9_]{0,63}", fullmatch=True)


def test_entry_is_a_line_for_each_field() -> None:
    assert encode({"MESSAGE": "hello", "PRIORITY": 6}) == b"MESSAGE=hello\nPRIORITY=6\n"


def test_value_with_a_newline_has_its_length_before_it() -> None:
    assert encode({"MESSAGE": "a\nb"}) == b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\n"


def test_invalid_utf8_is_escaped() -> None:
    assert encode({"MESSAGE": "caf\udce9 é"}) == "MESSAGE=caf\\udce9 é\n".encode()


@given(st.dictionaries(NAMES, st.text()))
def test_no_value_can_forge_a_field(values: dict[str, str]) -> None:
    assert list(decode(encode(values))) == list(values.items())


def test_entry_that_is_too_large_for_a_datagram_is_sent_as_a_file(
    entries: Entries, sender: Journal
) -> None:
    sender.send({"MESSAGE": HUGE, "PRIORITY": 6})
    assert entries.read() == [{"MESSAGE": HUGE, "PRIORITY": "6"}]
    assert entries.files == 1


def test_sealed_file_cannot_be_changed() -> None:
    """The journal accepts no other."""
    with open(sealed(b"content"), "r+b", 0) as file:
        assert fcntl.fcntl(file, fcntl.F_GET_SEALS) == SEALS
        assert os.pread(file.fileno(), 100, 0) == b"content"
        with pytest.raises(PermissionError):
            file.write(b"x")


@pytest.mark.parametrize("text", ["short", HUGE])
def test_full_socket_raises_immediately(entries: Entries, sender: Journal, text: str) -> None:
    with contextlib.suppress(BlockingIOError):
        for _ in range(100_000):
            sender.send({"MESSAGE": "hello"})
    with pytest.raises(BlockingIOError):
        sender.send({"MESSAGE": text})
    entries.read()
    sender.send({"MESSAGE": text})
    assert entries.read() == [{"MESSAGE": text}]


def test_journal_that_starts_later_gets_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    monkeypatch.setattr(journal, "SOCKET", str(path))
    with contextlib.closing(Journal()) as sender:
        for text in ("first", "second"):
            with pytest.raises(FileNotFoundError):
                sender.send({"MESSAGE": "lost"})
            with Entries(path) as entries:
                sender.send({"MESSAGE": text})
                assert entries.read() == [{"MESSAGE": text}]


@pytest.mark.parametrize("names", [["usual", "mounted"], ["mounted"]])
def test_entries_go_to_the_usual_place_if_there_is_one(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is that of the sandbox. With LogNamespace=, there are both."""
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "usual"))
    monkeypatch.setattr(journal, "MOUNTED", str(tmp_path / "mounted"))
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(Entries(tmp_path / name)) for name in names]
        with contextlib.closing(Journal()) as sender:
            sender.send({"MESSAGE": "hello"})
        assert found[0].read() == [{"MESSAGE": "hello"}]


@pytest.mark.parametrize("seconds", [10.0, 0.0])
def test_flush_waits_for_who_reads(entries: Entries, sender: Journal, seconds: float) -> None:
    sender.send({"MESSAGE": "hello"})
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(sender.flush, seconds)
        if not seconds:
            assert waiting.result() is False
            return
        assert not waiting.done()
        assert entries.read() == [{"MESSAGE": "hello"}]
        until(lambda: entries.read() == [] and waiting.done())
        assert waiting.result() is True


def test_flush_does_not_wait_for_a_full_socket_or_for_none(
    entries: Entries, sender: Journal
) -> None:
    with contextlib.suppress(BlockingIOError):
        for _ in range(100_000):
            sender.send({"MESSAGE": "hello"})
    assert sender.flush(1e9) is False
    entries.path.rename(entries.path.with_suffix(".gone"))
    assert sender.flush(1e9) is False
    entries.path.with_suffix(".gone").rename(entries.path)


# The fields of a message


def test_message_has_the_fields_of_the_journal(entries: Entries, handler: JournalHandler) -> None:
    record = message("hello %s", "world", level=logging.WARNING)
    handler.emit(record)
    (entry,) = entries.read()
    assert entry == {
        "MESSAGE": "hello world",
        "PRIORITY": "4",
        "SYSLOG_FACILITY": "3",
        "SYSLOG_IDENTIFIER": "tcpupperd",
        "CODE_FILE": record.pathname,
        "CODE_LINE": "1",
        "CODE_FUNC": "None",
        "TID": str(os.getpid()),
    }


def test_message_has_the_fields_that_it_was_given(
    entries: Entries, handler: JournalHandler
) -> None:
    record = message("hello")
    vars(record).update(Event.READY.fields(TCPUPPERD_WORKER=17))
    handler.emit(record)
    (entry,) = entries.read()
    assert entry["MESSAGE_ID"] == Event.READY.message_id
    assert entry["DOCUMENTATION"] == "man:tcpupperd(8)"
    assert entry["TCPUPPERD_WORKER"] == "17"


def test_message_of_an_error_has_its_number(entries: Entries, handler: JournalHandler) -> None:
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    handler.emit(message("cannot accept %s: %s", "it", error))
    raised = failure()
    raised.exc_info = (OSError, error, None)
    handler.emit(raised)
    handler.emit(message("fine: %s", OSError("without a number")))
    assert [entry.get("ERRNO") for entry in entries.read()] == ["24", "24", None]


def test_traceback_is_one_entry(entries: Entries, handler: JournalHandler) -> None:
    handler.emit(failure())
    (entry,) = entries.read()
    assert entry["MESSAGE"].startswith("bug\nTraceback (most recent call last):\n")
    assert entry["MESSAGE"].endswith("ValueError: first line\nsecond line")
    assert entry["PRIORITY"] == "3"


def test_message_that_cannot_be_formatted_is_still_told(
    entries: Entries, handler: JournalHandler
) -> None:
    handler.emit(message("%d lines", "many"))
    (entry,) = entries.read()
    assert "a message that cannot be formatted: '%d lines' ('many',)" in entry["MESSAGE"]


def test_fields_of_a_call_reach_the_record(entries: Entries, handler: JournalHandler) -> None:
    log = logging.getLogger("tcpupperd.test_journal")
    log.propagate = False
    log.addHandler(handler)
    log.warning("hello", extra=fields(TCPUPPERD_CLIENT="192.0.2.1"))
    log.removeHandler(handler)
    (entry,) = entries.read()
    assert entry["TCPUPPERD_CLIENT"] == "192.0.2.1"
    assert entry["CODE_FILE"] == __file__
    assert entry["CODE_FUNC"] == "test_fields_of_a_call_reach_the_record"
    assert int(entry["CODE_LINE"]) > 100


def test_process_that_exits_waits_for_the_journal_if_it_has_sent_something(
    entries: Entries, handler: JournalHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[float] = []
    monkeypatch.setattr(Journal, "flush", lambda _, timeout: flushed.append(timeout))
    handler.flush()
    assert flushed == []
    handler.emit(message("hello"))
    handler.flush()
    assert flushed == [FLUSH_TIME]


# Never in the way


def test_full_journal_drops_messages_and_tells_how_many(
    entries: Entries, handler: JournalHandler
) -> None:
    emit_all(handler, *(message("%d", number) for number in range(10_000)))
    read = entries.read()
    assert [entry["MESSAGE"] for entry in read] == [str(number) for number in range(len(read))]
    assert 0 < len(read) < 10_000
    emit_all(handler, message("again"), message("and again"))
    told, *others = entries.read()
    assert told["MESSAGE"] == f"{10_000 - len(read)} messages dropped"
    assert told["MESSAGE_ID"] == Event.MESSAGES_DROPPED.message_id
    assert told["PRIORITY"] == "4"
    assert [entry["MESSAGE"] for entry in others] == ["again", "and again"]


def test_without_the_journals_socket_messages_are_lines(
    entries: Entries, handler: JournalHandler, pipe: Pipe
) -> None:
    entries.path.rename(entries.path.with_suffix(".gone"))
    emit_all(handler, message("hello", level=logging.WARNING))
    assert pipe.read() == ["<4>hello"]
    entries.path.with_suffix(".gone").rename(entries.path)
    emit_all(handler, message("back"))
    assert [entry["MESSAGE"] for entry in entries.read()] == ["back"]
    assert pipe.read() == []


def test_without_anywhere_to_write_messages_are_counted(
    no_journal: None, handler: JournalHandler, pipe: Pipe
) -> None:
    pipe.close()
    emit_all(handler, message("lost"), failure())
    assert handler._dropped == 2


def test_fatal_message_also_goes_to_standard_error(
    entries: Entries, handler: JournalHandler, pipe: Pipe
) -> None:
    emit_all(handler, message("the end", level=logging.CRITICAL))
    assert pipe.read() == ["<2>the end"]
    assert [entry["MESSAGE"] for entry in entries.read()] == ["the end"]


def test_fatal_message_is_not_told_twice_without_a_journal(
    no_journal: None, handler: JournalHandler, pipe: Pipe
) -> None:
    emit_all(handler, message("the end", level=logging.CRITICAL))
    assert pipe.read() == ["<2>the end"]
