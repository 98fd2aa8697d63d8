"""The examples of other daemons on the parts of this one, under the test's own service manager."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.daemon import PASS_SOCKETS, ROOT
from integration.processes import descriptors, polled_for
from integration.service import Service
from outlive.channel import NAMES, SEND_END, Format, send
from waiting import DEADLINE, until

REVERSED = ROOT / "examples/reversed.py"
MANY = 600


class Reversed:
    """A context manager that runs examples/reversed.py; its end is a stop for a restart."""

    def __init__(self, service: Service, log: Path) -> None:
        self.service = service
        self.log = log
        self.ended_by = signal.SIGUSR2

    def __enter__(self) -> "Reversed":
        passed = [("reversed.socket", self.service.listener), *self.service.manager.stored.items()]
        numbers = [one.fileno() for _, one in passed]
        names = ":".join(name for name, _ in passed)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", PASS_SOCKETS, ",".join(map(str, numbers)), names),
                    *(sys.executable, REVERSED),
                ],
                env=os.environ | self.service.manager.environment | {"PYTHONPATH": str(ROOT)},
                stderr=log,
                pass_fds=numbers,
            )
        self.service.manager.wait("READY=1")
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.send_signal(self.ended_by)
        assert self.process.wait(DEADLINE) == 0, self.log.read_text()

    @property
    def waits_to_send(self) -> bool:
        """Whether it waits to send to a client."""
        pid = self.process.pid
        return any(polled_for(pid, fd) & select.EPOLLOUT for fd in descriptors(pid))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_lines_are_reversed(service: Service, log: Path) -> None:
    with Reversed(service, log) as daemon:
        client = service.connect()
        client.send(b"one\ntwo\nthr")
        assert [client.read_line(), client.read_line()] == [b"eno\n", b"owt\n"]
        assert client.ask(b"ee") == b"eerht"
        daemon.ended_by = signal.SIGTERM
    assert client.read_to_end() == b""


def test_connections_outlive_restarts(service: Service, log: Path) -> None:
    with Reversed(service, log):
        until(lambda: service.manager.stored.keys() == NAMES)
        clients = [service.connect() for _ in range(MANY)]
        for number, client in enumerate(clients):
            assert client.ask(b"line %d" % number) == (b"line %d" % number)[::-1]
            client.send(b"half ")
    queued = service.connect()
    queued.send(b"queued\n")
    for _ in range(2):
        with Reversed(service, log):
            for client in clients:
                assert client.ask(b"a line") == b"enil a flah"
                client.send(b"half ")
    assert queued.read_line() == b"deueuq\n"
    assert log.read_text() == ""


def test_unread_answers_outlive_a_restart(service: Service, log: Path) -> None:
    with Reversed(service, log) as daemon:
        slow = service.connect(4096)
        sent = slow.clog(lambda: daemon.waits_to_send)
    with Reversed(service, log):
        slow.end()
        answers = [line[::-1] + b"\n" for line in sent.split(b"\n")[:-1]]
        assert slow.read_to_end() == b"".join(answers)


def test_client_of_a_damaged_message_ends_alone(service: Service, log: Path) -> None:
    with Reversed(service, log):
        whole = service.connect()
        assert whole.ask(b"one") == b"eno"
    lost = service.connect()
    request, _ = service.listener.accept()
    with request:
        form = Format(b"reversed", 2)
        send(service.manager.stored[SEND_END], form, [request], lambda file: file.write(b"?"))
    with Reversed(service, log):
        assert lost.read_to_end() == b""
        assert whole.ask(b"two") == b"owt"
    assert "closing 1 connection whose state cannot be restored: " in log.read_text()


def test_client_that_resets_harms_no_others(service: Service, log: Path) -> None:
    with Reversed(service, log):
        clients = [service.connect() for _ in range(4)]
        for client in clients:
            assert client.ask(b"one") == b"eno"
        clients[0].reset()
        clients[1].close()
        assert clients[2].ask(b"two") == b"owt"
        clients[3].reset()
    with Reversed(service, log):
        assert clients[2].ask(b"two") == b"owt"
    assert log.read_text() == ""
