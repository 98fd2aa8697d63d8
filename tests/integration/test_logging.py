"""What is logged, and where to."""

import contextlib
import os
import re
import select
import signal
from pathlib import Path

import pytest

from entries import Entries, LiveEntries
from integration.client import OWN
from integration.daemon import Daemon
from integration.journal import BUG, Journal
from integration.processes import stopped
from tcpupperd.events import Event
from tcpupperd.serving import fast_path
from waiting import DEADLINE, until

PLAIN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) .+")


# What is logged


def test_connections_are_logged_for_debugging() -> None:
    with Daemon(log_level="debug") as daemon:
        client = daemon.connect()
        name = f"127.0.0.1:{client.port}"
        assert client.ask(b"hello") == b"HELLO"
        client.send(b"hal")
        until(lambda: f"DEBUG {name}: received 3 bytes, answering 0" in daemon.log)
        client.end()
        assert client.read_to_end() == b"HAL"
        until(lambda: f"DEBUG {name}: closed after 2 lines" in daemon.log)
        assert f"DEBUG {name}: connected" in daemon.log
        assert f"DEBUG {name}: received 6 bytes, answering 6" in daemon.log
        assert f"DEBUG {name}: received 0 bytes, answering 3" in daemon.log


def test_nothing_that_clients_send_is_logged() -> None:
    with Daemon(log_level="debug", log_connections=True, workers=1) as daemon:
        client = daemon.connect()
        assert client.ask(b"secret") == b"SECRET"
        client.send(b"secret")
        until(lambda: "received 6 bytes, answering 0" in daemon.log)
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        client.end()
        assert client.read_to_end() == b"SECRET"
        until(lambda: ": client closed after 2 lines in " in daemon.log)
        assert "secret" not in daemon.log.lower()


def test_clients_are_named_as_people_write_addresses() -> None:
    local = f"{OWN}-logged"
    with Daemon(log_level="debug", listen=["0", local]) as daemon:
        port = daemon.addresses[0].rpartition(":")[2]
        over_ipv4 = daemon.connect(f"127.0.0.1:{port}")
        over_ipv6 = daemon.connect(f"[::1]:{port}")
        until(lambda: f"127.0.0.1:{over_ipv4.port}: connected" in daemon.log)
        until(lambda: f"[::1]:{over_ipv6.port}: connected" in daemon.log)
        daemon.connect(local)
        until(lambda: "local client: connected" in daemon.log)
        assert "ffff" not in daemon.log


def test_connections_are_not_logged_otherwise() -> None:
    with Daemon(max_connections=50) as daemon:
        client = daemon.connect()
        assert client.ask(b"hello") == b"HELLO"
        client.close()
        until(lambda: daemon.counters()["open"] == 0)
        daemon.stop()
        messages = [line.split(" ", 3)[3] for line in daemon.log.splitlines()]
        ready = f"ready: 2 workers, {fast_path.implementation}, listening on 127.0.0.1:"
        assert messages[0].startswith(ready)
        assert all(message.startswith("counters: ") for message in messages[1:-1])
        assert messages[-1] == "stopping: closing 0 connections"


def test_level_changes_with_a_reload() -> None:
    with Daemon(log_level="warning") as daemon:
        assert daemon.connect().ask(b"hello") == b"HELLO"
        assert daemon.log == ""
        daemon.configure(log_level="debug")
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "reloaded: " in daemon.log)
        until(lambda: daemon.log.count(" has exited") == 2)  # of the old level, to the last moment
        daemon.connect()
        until(lambda: ": connected" in daemon.log)


def test_clients_that_go_away_are_no_trouble() -> None:
    with Daemon() as daemon:
        idle, half, slow = daemon.connect(), daemon.connect(), daemon.connect(receive_buffer=4096)
        assert idle.ask(b"hello") == b"HELLO"
        half.send(b"hal")
        daemon.clog(slow)
        for client in (idle, half, slow):
            client.reset()
        with stopped(*daemon.workers()):
            for _ in range(5):  # gone before they are accepted
                queued = daemon.connect()
                queued.send(b"queued\n")
                queued.reset()
            answered = daemon.connect()
            answered.send(b"answer this\n" * 1000)
            answered.close()
        until(lambda: daemon.counters()["accepted"] == 9)
        until(lambda: daemon.counters()["open"] == 0)
        assert daemon.counters()["bug"] == 0
        assert daemon.counters()["reset"] + daemon.counters()["probe"] >= 3
        assert set(PLAIN.findall(daemon.log)) == {"INFO"}
        assert "Traceback" not in daemon.log


# Where to


def make_trouble(daemon: Daemon, workers: int) -> int:
    """Kill a worker, and reload an invalid file; the worker's process ID."""
    killed = daemon.workers()[0]
    os.kill(killed, signal.SIGKILL)
    daemon.wait_for_workers(workers, without=killed)
    daemon.configure("wrong = 1\n")
    daemon.send_signal(signal.SIGHUP)
    daemon.manager.wait("STATUS=.*failed.*")
    return killed


def test_lines_in_the_journal_have_priorities(journal: Journal) -> None:
    with Daemon(wrapper=journal.wrapper, log_level="debug") as daemon:
        assert daemon.connect().ask(b"hello") == b"HELLO"
        make_trouble(daemon, workers=2)
    lines = journal.read_to_end()
    assert priority_of("ready: 2 workers", lines) == 6
    assert priority_of("127.0.0.1:[0-9]*: connected", lines) == 7
    assert priority_of("worker [0-9]* was killed by SIGKILL", lines) == 4
    assert priority_of("reload failed", lines) == 3
    assert priority_of("stopping", lines) == 6
    assert all(re.match("<[0-7]>[^<]", line) for line in lines)


def test_failure_to_start_is_critical_in_the_journal(journal: Journal) -> None:
    status, _ = Daemon(wrapper=journal.wrapper, max_line=0).run()
    assert status == 78
    assert priority_of(".*max_line = 0: must be a whole number", journal.read_to_end()) == 2


def test_each_line_of_a_traceback_has_its_priority(journal: Journal) -> None:
    with journal.customize.open("a") as file:
        file.write(BUG)
    with Daemon(wrapper=journal.wrapper, workers=1) as daemon:
        unlucky, other = daemon.connect(), daemon.connect()
        assert other.ask(b"one") == b"ONE"
        unlucky.send(b"bug\n")
        unlucky.wait_for_end()
        assert other.ask(b"two") == b"TWO"
        daemon.stop()
    lines = journal.read_to_end()
    bug = lines.index("<3>Traceback (most recent call last):")
    end = lines.index("<3>RuntimeError: a bug", bug)
    assert re.match(
        r"<3>bug while serving .*127\.0\.0\.1.*; closing the connection", lines[bug - 1]
    )
    assert all(line.startswith("<3>") for line in lines[bug:end])


def test_journal_gets_entries(journal: Journal) -> None:
    with journal.customize.open("a") as file:
        file.write(BUG)
    with LiveEntries(journal.socket) as entries:
        with Daemon(wrapper=journal.wrapper, max_connections_per_source=1, workers=1) as daemon:
            client = daemon.connect()
            assert client.ask(b"hello") == b"HELLO"
            refused = daemon.connect()
            port = refused.port
            refused.wait_for_end()
            client.send(b"bug\n")
            client.wait_for_end()
            killed = make_trouble(daemon, workers=1)
        found = entries.read()
    assert journal.read_to_end() == []
    of = {entry["MESSAGE_ID"]: entry for entry in found if "MESSAGE_ID" in entry}
    assert of[Event.READY.message_id]["PRIORITY"] == "6"
    assert of[Event.SOURCE_LIMIT.message_id]["TCPUPPERD_CLIENT"] == "127.0.0.1"
    assert of[Event.SOURCE_LIMIT.message_id]["TCPUPPERD_PORT"] == str(port)
    assert of[Event.WORKER_DIED.message_id]["TCPUPPERD_WORKER"] == str(killed)
    assert of[Event.RELOAD_REFUSED.message_id]["PRIORITY"] == "3"
    (bug,) = (entry for entry in found if "Traceback" in entry["MESSAGE"])
    assert bug["MESSAGE"].endswith("RuntimeError: a bug")
    assert bug["TID"] == str(killed)


def test_keeper_waits_until_the_journal_knows_its_unit(journal: Journal) -> None:
    """Only a process that is about to exit asks how far the journal is."""
    daemon = Daemon(wrapper=journal.wrapper, workers=1, log_level="info")
    with Entries(journal.socket) as entries, daemon:
        client = daemon.connect()
        assert client.ask(b"hello") == b"HELLO"
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        told = {
            "MESSAGE": f"handed over 1 connection of worker {worker}",
            "TCPUPPERD_WORKER": str(worker),
        }
        until(lambda: any(told.items() <= entry.items() for entry in entries.read()))
        until(lambda: [entries.read(), entries.questions][-1])


def test_failure_to_start_is_an_entry_and_a_line(journal: Journal) -> None:
    """The journal may look for the unit of an entry's sender when that has exited."""
    with LiveEntries(journal.socket) as entries:
        Daemon(wrapper=journal.wrapper, max_line=0).run()
        (entry,) = entries.read()
    assert entry["PRIORITY"] == "2"
    assert journal.read_to_end() == ["<2>" + entry["MESSAGE"]]


def test_serves_while_the_journal_does_not_read(journal: Journal) -> None:
    with Entries(journal.socket) as entries:
        with Daemon(wrapper=journal.wrapper, log_level="debug", workers=1) as daemon:
            client = daemon.connect()
            for _ in range(1000):
                assert client.ask(b"hello") == b"HELLO"
            before = len(entries.read())
            assert client.ask(b"hello") == b"HELLO"
            told, after, *_ = entries.read()
        assert told["MESSAGE_ID"] == Event.MESSAGES_DROPPED.message_id
        dropped, _, words = told["MESSAGE"].partition(" ")
        assert words == "messages dropped"
        assert 0 < 1000 - before < int(dropped) <= 1000
        assert "received 6 bytes" in after["MESSAGE"]


def test_check_tells_the_journal_lines(journal: Journal) -> None:
    """It is soon gone."""
    with LiveEntries(journal.socket) as entries:
        Daemon("--check", wrapper=journal.wrapper, max_line=0).run()
        assert entries.read() == []
    assert priority_of(".*max_line = 0: must be a whole number", journal.read_to_end()) == 2


def priority_of(message: str, lines: list[str]) -> int:
    """The priority of the first line with a message, given as a pattern."""
    found = [match[1] for line in lines if (match := re.match(f"<([0-7])>{message}", line))]
    assert found, lines
    return int(found[0])


def test_lines_elsewhere_are_for_people() -> None:
    """JOURNAL_STREAM is inherited by programs whose output was redirected."""
    with Daemon(wrapper=("env", "JOURNAL_STREAM=8:1"), max_connections=50) as daemon:
        daemon.reload()
        daemon.stop()
        lines = daemon.log.splitlines()
        assert len(lines) == 3
        assert all(PLAIN.fullmatch(line) for line in lines)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "0<&- 1>&- 2>&-"])
def test_serves_without_anywhere_to_log_to(redirection: str) -> None:
    wrapper = ("sh", "-c", f'exec "$@" {redirection}', "sh")
    with Daemon(wrapper=wrapper, log_level="debug") as daemon:
        for _ in range(100):
            client = daemon.connect()
            assert client.ask(b"hello") == b"HELLO"
            client.close()
        daemon.configure("wrong = 1\n")
        daemon.send_signal(signal.SIGHUP)
        daemon.manager.wait("STATUS=.*failed.*")
        assert daemon.connect().ask(b"hello") == b"HELLO"


def test_serves_while_the_log_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    with os.fdopen(reader, "rb", 0):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(reader, b"x" * 4096)
        wrapper = ("sh", "-c", f'exec "$@" 2>{pipe}', "sh")
        with Daemon(wrapper=wrapper, log_level="debug") as daemon:
            client = daemon.connect()
            for _ in range(100):
                assert client.ask(b"hello") == b"HELLO"

            # Once it is read again, the log says what is missing.
            read_all(reader)
            assert client.ask(b"hello") == b"HELLO"
            log = b""
            while b"received" not in log:
                assert select.select([reader], [], [], DEADLINE)[0]
                log += read_all(reader)
            first, *_ = log.decode().splitlines()
            assert re.search("[0-9]+ messages? dropped", first)
            assert int(re.findall("[0-9]+", first)[-1]) > 100


def read_all(fd: int) -> bytes:
    """All that waits in a pipe."""
    found = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            found += os.read(fd, 65536)
    return found
