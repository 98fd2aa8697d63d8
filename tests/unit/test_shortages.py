"""Each call of the handover, the store, the journal and the scoreboard fails with each error that
it can have for lack of something: the rest goes on, nothing leaks, and the message is true."""

import errno
import fcntl
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.manager import Manager
from outlive import memfd
from outlive.canary import CANARY
from outlive.channel import RECEIVE_END, SEND_END, Channel, is_end
from outlive.notify import Notifier, NotifySocket
from outlive.remedies import remedy
from tcpupperd.host import journal, messages
from tcpupperd.processes.connection_format import Connection, send
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.processes.store import CONFIGURATION, LOST, NOT_STORED, Store
from tcpupperd.serving.connection import State
from unit.channels import close, is_served_by, receive_from, tcp_pairs
from waiting import until

#: The errors, each with what its remedy names.
ERRORS = {
    errno.EFBIG: "LimitFSIZE=",
    errno.ENOSPC: "memory",
    errno.ENOMEM: "memory",
    errno.EMFILE: "LimitNOFILE=",
    errno.ENFILE: "fs.file-max",
    errno.EPERM: "sandbox",
    errno.EACCES: "sandbox",
    errno.ETOOMANYREFS: "LimitNOFILE=",
}

each_error = pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@each_error
def test_remedy_names_the_limit(number: int) -> None:
    assert ERRORS[number] in remedy(OSError(number, ""))


def test_lack_of_memory_has_a_remedy_and_a_bug_has_none() -> None:
    assert "memory" in remedy(MemoryError())
    assert remedy(ValueError()) == remedy(OSError()) == remedy(OSError(errno.EBADF, "")) == ""


# The state of connections


def fail_to_create(number: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "memfd_create", failing(number))


def fail_to_write(number: int, patch: pytest.MonkeyPatch) -> None:
    """As write(2) does with RLIMIT_FSIZE: here, the file can only be read."""
    real = os.memfd_create

    def create(*arguments: Any) -> int:
        fd = real(*arguments)
        patch.setattr("builtins.open", failing(number))
        return fd

    patch.setattr(os, "memfd_create", create)


@each_error
@pytest.mark.parametrize("fail", [fail_to_create, fail_to_write])
def test_state_travels_without_a_file(
    channel: Channel, number: int, fail: Callable[[int, pytest.MonkeyPatch], None]
) -> None:
    pairs = tcp_pairs(20)
    state = State(held=b"x" * 1000, unsent=b"Y" * 5000, mid_line=True)
    with pytest.MonkeyPatch.context() as patch:
        fail(number, patch)
        send(channel.send_end, [Connection(server, ("::1", 5), state) for _, server in pairs])
    taken = receive_from(channel)
    assert [one.state for one in taken] == [state] * 20
    for (client, _), one in zip(pairs, taken, strict=True):
        assert is_served_by(client, one.socket)
    close(one for pair in pairs for one in pair)
    close(one.socket for one in taken)


@each_error
def test_error_of_a_state_that_fits_nowhere_is_that_of_the_file(
    channel: Channel, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "memfd_create", failing(number))
    client, server = socket.socketpair()
    with client, server, pytest.raises(OSError, match=rf"\[Errno {number}\]"):
        send(channel.send_end, [Connection(server, "", State(unsent=b"Y" * 2**24))])
    with pytest.raises(BlockingIOError):
        receive_from(channel)


# The store


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify"), store=True) as manager:
        yield manager


def store_of(manager: Manager) -> Store:
    """A store with what the service manager keeps."""
    stored = [(name, os.dup(one.fileno())) for name, one in manager.stored.items()]
    return Store(stored, Notifier(manager.environment), offered=True)


@each_error
def test_texts_that_cannot_be_stored_cost_nothing_else(
    manager: Manager,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", failing(number))
        store = store_of(manager)
        store.keep_configuration("workers = 5\n")
    with store:
        assert store.problem == NOT_STORED
        assert ERRORS[number] in caplog.text
        until(lambda: manager.stored.keys() == {SEND_END, RECEIVE_END, CANARY})
        assert store.keeps
        store.keep_configuration("workers = 6\n")
        until(lambda: CONFIGURATION in manager.stored)
        assert not store.problem


@each_error
@pytest.mark.parametrize("call", [(NotifySocket, "send_file"), (socket, "socketpair")])
def test_canary_that_cannot_be_sent_is_sent_later(
    manager: Manager,
    number: int,
    call: tuple[Any, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with store_of(manager):
        until(lambda: CANARY in manager.stored)
    manager.stored.pop(CANARY).close()  # so that it is not taken for the one that comes later
    with monkeypatch.context() as patch:
        patch.setattr(*call, failing(number))
        store = store_of(manager)
        store.check()
        assert store.check_at < math.inf
        assert store.keeps  # it has just kept the channel
    # With it, SIGIO would end this process once the other end is closed.
    monkeypatch.setattr(store, "watch", lambda: None)
    with store:
        store.check()
        assert store.check_at == math.inf
        assert store.keeps
        assert not store.problem
        [warning] = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert ERRORS[number] in warning.getMessage()
        until(lambda: CANARY in manager.stored)
        manager.stored.pop(CANARY).close()
        until(lambda: not store.keeps)
        store.check()
        assert store.problem == LOST


@each_error
def test_channel_that_cannot_be_stored_is_not_said_to_be(
    manager: Manager, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(NotifySocket, "send_file", failing(number))
        store = store_of(manager)
    with store:
        assert not store.keeps
        assert store.problem == LOST


@each_error
def test_stored_channel_is_recognised_without_another_descriptor(
    no_leak: None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(os, "dup", failing(number))
    assert all(is_end(one.fileno()) for one in ends)
    close(ends)


# Files, the journal and the scoreboard


@each_error
def test_file_that_cannot_be_sealed_is_closed(
    no_leak: None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(number))
    with pytest.raises(OSError, match=rf"\[Errno {number}\]"):
        memfd.sealed(b"text")


@each_error
def test_entry_that_is_too_long_for_the_journal_becomes_lines(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    handler = messages.JournalHandler(messages.StreamHandler(writing, prefixed=True))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "journal"))
        monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "journal"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "memfd_create", failing(number))
            text = "x" * 2**24
            handler.emit(logging.LogRecord("n", logging.ERROR, __file__, 1, text, None, None))
    assert os.read(reading, 10_000).startswith(b"<3>xxxx")
    os.close(reading)
    os.close(writing)
    handler.close()


@each_error
@pytest.mark.parametrize("call", ["memfd_create", "truncate"])
def test_scoreboard_works_without_a_file(
    number: int, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        scoreboard = Scoreboard(2)
    assert ERRORS[number] in caplog.text
    slot = scoreboard.claim()
    slot.numbers[0] = 1
    assert scoreboard.open() == 0
