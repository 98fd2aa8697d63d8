"""Messages to syslog, to a socket that stands for the syslog daemon's."""

import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpupperd.host.messages import SyslogHandler
from waiting import DEADLINE


def message(text: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("tcpupperd", level, "", 0, text, (), None)


def bound(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.bind(str(path))
    one.setblocking(False)
    return one


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def handler(address: Path) -> Iterator[SyslogHandler]:
    one = SyslogHandler(str(address))
    yield one
    one._socket.close()


def test_messages_have_priority_and_name(handler: SyslogHandler, address: Path) -> None:
    with bound(address) as daemon:
        handler.handle(message("hello"))
        handler.handle(message("two\nlines", logging.ERROR))
        said = [daemon.recv(1000) for _ in range(3)]
    assert said == [b"<30>tcpupperd: hello\n", b"<27>tcpupperd: two\n", b"<27>tcpupperd: lines\n"]


def test_daemon_that_does_not_read_is_not_waited_for(
    handler: SyslogHandler, address: Path
) -> None:
    with bound(address) as daemon:
        # In a thread, so that a message that waits fails this test and not the whole run.
        messages = [message(f"message {number}") for number in range(1000)]
        thread = threading.Thread(target=lambda: [*map(handler.handle, messages)], daemon=True)
        thread.start()
        thread.join(DEADLINE)
        assert not thread.is_alive()
        assert b"message 0" in daemon.recv(1000)
        handler.handle(message("after all"))
        kept = 1
        while b"dropped" not in (said := daemon.recv(1000)):
            kept += 1
        assert int(said.split()[1]) == 1000 - kept > 0


def test_daemon_may_be_missing_and_come_back(handler: SyslogHandler, address: Path) -> None:
    handler.handle(message("lost"))
    for _ in range(2):
        with bound(address) as daemon:
            handler.handle(message("hello"))
            assert b"1 message dropped" in daemon.recv(1000)
            assert b"hello" in daemon.recv(1000)
        os.unlink(address)
        handler.handle(message("lost"))
