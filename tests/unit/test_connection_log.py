"""The log of connections that have ended: how much of it there is."""

import logging
import math
import socket
from collections.abc import Iterator

import pytest

from tcpupperd.events import Event
from tcpupperd.serving.connection import Connection, Limits
from tcpupperd.serving.connection_log import BURST, RATE, SUMMARY_INTERVAL, ConnectionLog
from tcpupperd.serving.counters import Tally
from tcpupperd.serving.poller import Poller
from tcpupperd.serving.protocol import LineProtocol

NOW = 1e6


class Log:
    """A log of a connection that can end any number of times, and what it says."""

    def __init__(self, caplog: pytest.LogCaptureFixture, workers: int) -> None:
        self._caplog = caplog
        caplog.set_level(logging.INFO)
        self.poller = Poller()
        self.connections = ConnectionLog(workers, self.poller)
        never = Limits(math.inf, math.inf, math.inf, math.inf, math.inf)
        one, self._other = socket.socketpair()
        self.connection = Connection(one, ("192.0.2.1", 5), LineProtocol(9), never, Tally())
        self.connection.began = NOW - 1.5
        self.connection.reason = "idle timeout"

    def end(self, count: int, now: float) -> None:
        for _ in range(count):
            self.connections.ended(self.connection, now)

    def messages(self) -> list[str]:
        """The messages since the last time."""
        found = list(self._caplog.messages)
        self._caplog.clear()
        return found

    def close(self) -> None:
        self.connection.socket.close()
        self._other.close()
        self.poller.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Log]:
    log = Log(caplog, workers=100)
    yield log
    log.close()


def test_message_says_how_the_connection_ended(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    log.end(1, NOW)
    (record,) = caplog.records
    assert record.getMessage() == "192.0.2.1:5: idle timeout after 0 lines in 1.5 s"
    fields = vars(record)["fields"]
    assert fields["MESSAGE_ID"] == Event.CONNECTION_ENDED.message_id
    assert fields["TCPUPPERD_CLIENT"] == "192.0.2.1"
    assert fields["TCPUPPERD_DURATION_USEC"] == 1_500_000


def test_unsent_answers_at_a_stop_are_the_reason(log: Log) -> None:
    log.connection.reason = ""
    log.connection.unsent = memoryview(b"HELLO")
    log.connection.abort(NOW)
    log.end(1, NOW)
    (message,) = log.messages()
    assert message.startswith("192.0.2.1:5: drain timeout after ")


def test_time_in_other_processes_counts(log: Log) -> None:
    state = log.connection.state(NOW)
    assert state.open_for == 1.5
    log.connection.restore(state, NOW + 7)
    log.end(1, NOW + 8)
    (message,) = log.messages()
    assert message.endswith(" in 2.5 s")


def test_socket_that_is_closed_has_fewer_fields(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    log.connection.socket.close()
    log.end(1, NOW)
    (record,) = caplog.records
    assert "TCPUPPERD_CONNECTION" not in vars(record)["fields"]


def test_each_worker_has_its_share_of_burst_and_rate(log: Log) -> None:
    log.end(BURST, NOW)
    assert len(log.messages()) == BURST // 100
    log.end(RATE, NOW + 1)
    assert len(log.messages()) == RATE // 100
    log.end(BURST, NOW + 1e6)
    assert len(log.messages()) == BURST // 100


def test_number_left_out_is_told_in_time(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    log.end(BURST // 100, NOW)
    log.poller.now = NOW + SUMMARY_INTERVAL
    log.poller.finish()
    log.messages()
    log.end(3, NOW)
    log.end(4, NOW + 0.001)
    log.poller.now -= 0.001
    log.poller.finish()
    assert not caplog.records
    log.poller.now = NOW + SUMMARY_INTERVAL
    log.poller.finish()
    log.poller.finish()
    (record,) = caplog.records
    assert record.getMessage() == "7 connections ended without being logged (rate limit)"
    assert record.levelno == logging.WARNING
    assert vars(record)["fields"]["MESSAGE_ID"] == Event.MESSAGES_DROPPED.message_id


def test_nothing_is_told_of_none(log: Log) -> None:
    log.end(1, NOW)
    log.messages()
    log.connections.log_summary()
    assert log.messages() == []
