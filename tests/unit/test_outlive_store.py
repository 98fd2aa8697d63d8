"""The store of a service with one process: what cannot be sent is sent later."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from integration.manager import Manager
from outlive.canary import CANARY
from outlive.channel import NAMES
from outlive.notify import Notifier, NotifySocket
from outlive.store import SIZE_MAX, Store
from waiting import until


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify"), store=True) as manager:
        yield manager


def store_of(manager: Manager) -> closing[Store]:
    stored = [(name, os.dup(one.fileno())) for name, one in manager.stored.items()]
    return closing(Store(stored, Notifier(manager.environment)))


def too_many(one: NotifySocket, data: bytes, fd: int) -> None:
    raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))


def test_everything_that_cannot_be_sent_is_sent_later(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(NotifySocket, "send_file", too_many)
            store = stack.enter_context(store_of(manager))
            store.put("settings", b"some")
            store.retry()
            assert store.missing
            assert not store.keeps
        store.retry()
        assert not store.missing
        until(lambda: manager.stored.keys() == NAMES | {CANARY, "settings"})
        assert store.keeps
    with store_of(manager) as following:
        assert following.get("settings") == b"some"


def test_store_that_has_just_kept_the_channel_is_trusted(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_of(manager):
        until(lambda: manager.stored.keys() == NAMES | {CANARY})
    monkeypatch.setattr(NotifySocket, "send_file", too_many)
    with store_of(manager) as following:
        assert following.keeps


def test_store_that_is_too_small_keeps_nothing(manager: Manager) -> None:
    """What does not fit is the canary, so that this is noticed."""
    manager.room = len(NAMES)
    with store_of(manager) as store:
        until(lambda: not store.keeps)
        assert manager.stored.keys() == NAMES


def test_content_that_cannot_be_stored_is_not_tried_again(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be as large the next time. The previous one remains in the store."""
    with store_of(manager) as store:
        store.put("memory", b"good")
        until(lambda: "memory" in manager.stored)
        monkeypatch.setattr(os, "memfd_create", failing)
        store.put("memory", b"lost")
        assert not store.missing
        assert "cannot store memory" in caplog.text
    with store_of(manager) as following:
        assert following.get("memory") == b"good"


def failing(name: str, flags: int) -> int:
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_lost_store_is_noticed(manager: Manager) -> None:
    with store_of(manager) as store:
        until(lambda: CANARY in manager.stored)
        manager.forget(CANARY)
        assert not store.keeps


def test_what_cannot_be_used_is_removed(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    reading, writing = os.pipe()
    stored = [("settings", reading), ("other", writing)]
    with closing(Store(stored, Notifier(manager.environment))):
        manager.wait("FDNAME=other")
    assert [one.split(",")[0] for one in caplog.messages] == [
        "closing the stored descriptor settings",
        "closing the stored descriptor other",
    ]


def test_too_much_is_an_error(manager: Manager) -> None:
    with store_of(manager) as store, pytest.raises(ValueError, match="are too many"):
        store.put("memory", bytes(SIZE_MAX + 1))


def test_without_a_service_manager_nothing_is_kept() -> None:
    with closing(Store([], Notifier({}))) as store:
        store.put("settings", b"some")
        assert store.get("settings") == b"some"
        assert not store.keeps
        assert not store.missing
