"""The example that keeps HTTP connections of uvicorn: what a restart does to requests."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread

import pytest

from integration.application import LONG
from integration.daemon import ROOT
from outlive.testing import Manager
from waiting import DEADLINE, until

CLIENTS = 30
RESTARTS = 4


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    if not find_spec("uvicorn"):
        pytest.skip("uvicorn is not installed (pip install uvicorn)")
    program = str(ROOT / "examples/kept_uvicorn.py")
    path = f"{ROOT}:{Path(__file__).parent}"
    environ = os.environ | {"PYTHONPATH": path, "GATE": str(tmp_path / "gate")}
    command = (sys.executable, program, "test", "application:application")
    with Manager(*command, environ=environ, timeout=DEADLINE) as manager:
        yield manager


def request(path: bytes, body: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (path, len(body), body)


def answer(one: socket.socket) -> bytes:
    """The body of the next answer."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (byte := one.recv(1)):
        head += byte
    assert head.startswith(b"HTTP/1.1 200 ")
    fields = dict(line.split(b": ") for line in head.lower().split(b"\r\n")[1:-2])
    body = bytearray()
    while len(body) < int(fields[b"content-length"]):
        data = one.recv(int(fields[b"content-length"]) - len(body))
        assert data
        body += data
    return bytes(body)


def test_incomplete_request_is_continued(manager: Manager) -> None:
    with manager.connect() as one:
        text = request(b"/a", b"ab") + request(b"/b", b"c")
        one.sendall(text[:-20])
        assert answer(one) == b"/a 195"
        manager.restart()
        one.sendall(text[-20:])
        assert answer(one) == b"/b 99"


def test_request_in_progress_is_answered_first(manager: Manager, tmp_path: Path) -> None:
    with manager.connect() as one, manager.connect() as other:
        one.sendall(request(b"/gate") + request(b"/next") + b"PO")
        until(lambda: "at the gate" in manager.output)
        other.sendall(request(b"/body", b"abc")[:-1])
        manager.send(signal.SIGUSR2)
        until(lambda: manager.is_stopping)
        other.sendall(b"c")
        (tmp_path / "gate").touch()
        assert manager.wait() == 0
        manager.start()
        assert answer(one) == b"/gate 0"
        assert answer(one) == b"/next 0"
        one.sendall(request(b"/last").removeprefix(b"PO"))
        assert answer(one) == b"/last 0"
        assert answer(other) == b"/body 294"
        words = ("startup\n", "at the gate\n", "shutdown\n", "startup\n")
        assert [line for line in manager.output.splitlines(True) if line in words] == [*words]


@pytest.mark.parametrize("order", [signal.SIGUSR2, signal.SIGTERM])
def test_request_that_waits_behind_another_is_received_to_its_end(
    manager: Manager, order: signal.Signals, tmp_path: Path
) -> None:
    """uvicorn stops reading because of its beginning, and needs the rest of it after the order."""
    with manager.connect() as one:
        one.sendall(request(b"/gate"))
        until(lambda: "at the gate" in manager.output)
        text = request(b"/next", b"abc")
        one.sendall(text[:-1])
        manager.send(order)
        until(lambda: manager.is_stopping)
        (tmp_path / "gate").touch()
        assert answer(one) == b"/gate 0"
        one.sendall(text[-1:])
        assert answer(one) == b"/next 294"
        assert manager.wait() == 0
        manager.start()


def test_busy_client_does_not_delay_a_restart(manager: Manager, tmp_path: Path) -> None:
    """It sends its next request as soon as it has the answer; the next process begins it."""
    with manager.connect() as one:
        one.sendall(request(b"/gate"))
        until(lambda: "at the gate" in manager.output)
        manager.send(signal.SIGUSR2)
        until(lambda: manager.is_stopping)
        (tmp_path / "gate").touch()
        assert answer(one) == b"/gate 0"
        one.sendall(request(b"/gate"))
        assert manager.wait() == 0
        manager.start()
        assert answer(one) == b"/gate 0"
        words = ("startup\n", "at the gate\n", "shutdown\n")
        lines = [line for line in manager.output.splitlines(True) if line in words]
        assert lines == [*words, *words[:2]]


def test_unread_answers_arrive(manager: Manager) -> None:
    with manager.connect() as one:
        one.sendall(request(b"/long") + request(b"/after"))
        until(lambda: one.recv(1, socket.MSG_PEEK))
        manager.restart()
        assert answer(one) == b"x" * LONG
        assert answer(one) == b"/after 0"


def test_stop_answers_all(manager: Manager, tmp_path: Path) -> None:
    with manager.connect() as one:
        one.sendall(request(b"/gate") + request(b"/next"))
        until(lambda: "at the gate" in manager.output)
        manager.send(signal.SIGTERM)
        until(lambda: manager.is_stopping)
        (tmp_path / "gate").touch()
        assert answer(one) == b"/gate 0"
        assert answer(one) == b"/next 0"
        assert one.recv(1) == b""
        assert manager.wait() == 0


def test_clients_do_not_see_restarts(manager: Manager) -> None:
    """Each sends one request after the other on a connection, which is never opened again."""
    ended, answers = Event(), [0] * CLIENTS
    clients = [Thread(target=work, args=(manager, i, ended, answers)) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    for _ in range(RESTARTS):
        manager.restart()
        before = list(answers)
        until(partial(all_more, answers, before))
    ended.set()
    for client in clients:
        client.join()
    assert min(answers) >= RESTARTS


def all_more(answers: list[int], before: list[int]) -> bool:
    return all(now > then for now, then in zip(answers, before, strict=True))


def work(manager: Manager, number: int, ended: Event, answers: list[int]) -> None:
    """Be a client; stop counting at the first fault."""
    one = HTTPConnection(*manager.address, timeout=DEADLINE)
    one.connect()
    one.auto_open = 0
    while not ended.wait(0.01):
        count = answers[number] + 1
        one.request("POST", f"/{number}", bytes([1]) * count)
        response = one.getresponse()
        if response.read() != b"/%d %d" % (number, count):
            return
        answers[number] = count
    one.close()
