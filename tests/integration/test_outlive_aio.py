"""Handlers and protocols of asyncio services: what a restart and a stop do to each kind."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest

from integration.client import ask
from integration.daemon import ROOT
from integration.processes import stopped
from outlive.testing import Manager
from waiting import DEADLINE, until

PROGRAM = Path(__file__).with_name("handlers.py")
#: Seconds; so long that a test fails where a handler is waited for in vain.
FOREVER = 10 * DEADLINE

Run = Callable[..., Manager]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Makes a manager of a handler."""
    if not find_spec(request.param):
        pytest.skip(f"{request.param} is not installed (pip install {request.param})")

    def run(name: str, grace: float = FOREVER) -> Manager:
        command = (sys.executable, str(PROGRAM), name, request.param, str(tmp_path / "gate"))
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        return Manager(*command, str(grace), environ=environ, timeout=DEADLINE)

    return run


#: For what the transports of a loop have no part in.
once = pytest.mark.parametrize("run", ["asyncio"], indirect=True)


@contextmanager
def client(manager: Manager, receive_buffer: int = 0) -> Iterator[socket.socket]:
    """A client; a small receive buffer makes one that leaves answers to the service."""
    with socket.socket() as one:
        if receive_buffer:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        one.settimeout(DEADLINE)
        one.connect(manager.address)
        yield one


def read(one: socket.socket, size: int) -> bytes:
    """What arrives, up to this many bytes."""
    data = b""
    while len(data) < size and (more := one.recv(min(size - len(data), 2**16))):
        data += more
    return data


def says(manager: Manager, text: str) -> None:
    """Wait until the service has written something to its log."""
    until(lambda: text in manager.output)


def restart_at_the_gate(manager: Manager, gate: Path) -> None:
    """Restart while a handler waits, and let it continue when the restart has begun."""
    says(manager, "at the gate")
    manager.send(signal.SIGUSR2)
    until(lambda: manager.is_stopping)
    gate.touch()
    assert manager.wait() == 0
    manager.start()


@pytest.mark.parametrize("name", ["lines", "protocol", "buffered"])
def test_states_and_incomplete_lines_are_handed_over(run: Run, name: str) -> None:
    with run(name) as manager, client(manager) as one:
        assert ask(one, b"a\nb") == b"1 a\n"
        for _ in range(3):
            manager.restart()
        assert ask(one, b"c\n") == b"2 bc\n"


@pytest.mark.parametrize("name", ["lines", "protocol", "buffered"])
def test_work_is_finished_before_a_restart(run: Run, name: str, tmp_path: Path) -> None:
    with run(name) as manager, client(manager) as one, client(manager) as other:
        assert ask(other, b"o\nth") == b"1 o\n"
        one.sendall(b"gate\nnext\nla")
        restart_at_the_gate(manager, tmp_path / "gate")
        assert read(one, 14) == b"1 gate\n2 next\n"
        assert ask(one, b"st\n") == b"3 last\n"
        assert ask(other, b"er\n") == b"2 ther\n"


@pytest.mark.parametrize("name", ["lines", "protocol", "buffered"])
def test_nothing_new_is_begun_before_a_restart(run: Run, name: str, tmp_path: Path) -> None:
    """What a busy client has already sent is left to the next process; it may be more than a loop
    reads in one iteration."""
    count = 10000
    with run(name) as manager, client(manager) as one:
        one.sendall(b"gate\n")
        says(manager, "at the gate")
        lines = b"gate\n" + b"%100d\n" % 0 * count
        sending = Thread(target=one.sendall, args=(lines,))
        sending.start()
        restart_at_the_gate(manager, tmp_path / "gate")
        answers = b"".join(b"%d %100d\n" % (i + 3, 0) for i in range(count))
        expected = b"1 gate\n2 gate\n" + answers
        assert read(one, len(expected)) == expected
        sending.join()
        assert manager.output == "at the gate\nserved\nat the gate\n"


@pytest.mark.parametrize("order", [signal.SIGUSR2, signal.SIGTERM])
def test_protocol_may_read_what_it_needs_to_finish(
    run: Run, order: signal.Signals, tmp_path: Path
) -> None:
    """It has not been reading when the order came."""
    with run("pairs") as manager, client(manager) as one:
        one.sendall(b"gate\nre")
        says(manager, "at the gate")
        manager.send(order)
        until(lambda: manager.is_stopping)
        one.sendall(b"st")
        (tmp_path / "gate").touch()
        assert ask(one, b"\n") == b"1 gate rest\n"
        assert manager.wait() == 0
        if order == signal.SIGUSR2:
            manager.start()
            assert ask(one, b"a\n") == b"2 a\n"
        assert "closing" not in manager.output


@pytest.mark.parametrize("name", ["lines", "protocol", "buffered"])
def test_all_that_has_arrived_is_answered_before_a_stop(
    run: Run, name: str, tmp_path: Path
) -> None:
    """There is more of it than a reader has taken from the kernel. Nothing is reset by what comes
    later."""
    count = 5000
    with run(name) as manager, client(manager) as one:
        one.sendall(b"gate\n")
        says(manager, "at the gate")
        one.sendall(b"%100d\n" % 0 * count + b"incomplete")
        manager.send(signal.SIGTERM)
        until(lambda: manager.is_stopping)
        (tmp_path / "gate").touch()
        answers = b"1 gate\n" + b"".join(b"%d %100d\n" % (i + 2, 0) for i in range(count))
        received = read(one, 1000)
        one.sendall(b"late\n" * 1000)
        received += read(one, len(answers) + 10**5)
        assert received.startswith(answers)
        assert manager.wait() == 0
        assert "rror" not in manager.output


def test_restart_does_not_wait_for_the_end_of_input(run: Run) -> None:
    """Of a client that has already sent more than can be answered in the time of this test."""
    with run("paced") as manager, client(manager) as one:
        one.sendall(b"a\n" * 100 * int(DEADLINE) * 2)
        for number in range(1, 100):
            if number % 30 == 0:
                manager.restart()
            assert ask(one, b"") == b"%d a\n" % number
        manager.kill()


@pytest.mark.usefixtures("many_in_flight")
def test_clients_that_come_with_a_restart_are_handed_over(run: Run) -> None:
    """They are accepted, but their handlers have not begun, or they wait in the accept queue."""
    with run("lines") as manager, ExitStack() as stack:
        with stopped(manager.pid):
            clients = [stack.enter_context(client(manager)) for _ in range(100)]
            for one in clients:
                one.sendall(b"a\n")
            manager.send(signal.SIGUSR2)
        assert manager.wait() == 0
        manager.start()
        for one in clients:
            assert ask(one, b"b\n") == b"1 a\n"
            assert ask(one, b"") == b"2 b\n"


@once
def test_no_alarm_kills_a_process_that_exits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come twice in the interval of the watchdog."""
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    with run("lines") as manager:
        for _ in range(5):
            manager.restart()


def test_request_in_several_calls_is_read_again(run: Run) -> None:
    with run("frames") as manager, client(manager) as one:
        one.sendall(b"5\nab")
        says(manager, "length 5")
        manager.restart()
        one.sendall(b"cde1\nf")
        assert read(one, 6) == b"edcbaf"
        one.sendall(b"2\n")
        says(manager, "length 2")
        manager.stop()
        assert read(one, 1) == b""
        assert "Traceback" not in manager.output


def test_reading_to_the_end_continues(run: Run) -> None:
    """What asyncio reads for this in parts is more than a reader holds."""
    data = bytes(range(256)) * 4096
    with run("whole") as manager, client(manager) as one:
        one.sendall(data)
        manager.restart()
        one.sendall(data)
        manager.restart()
        one.shutdown(socket.SHUT_WR)
        assert read(one, 100) == b"%d %d\n" % (2 * len(data), 2 * sum(data))


def test_idle_handler_is_interrupted(run: Run) -> None:
    with run("pushes") as manager, client(manager) as one:
        for number in range(1, 4):
            assert ask(one, b"") == b"%d\n" % number
            manager.restart()
        assert ask(one, b"") == b"4\n"
        manager.stop()
        assert read(one, 1) == b""


def test_restart_waits_for_each_task_of_a_connection(run: Run, tmp_path: Path) -> None:
    with run("both") as manager, client(manager) as one:
        assert ask(one, b"") == b"1\n"
        one.sendall(b"gate\nnext\n")
        restart_at_the_gate(manager, tmp_path / "gate")
        assert read(one, 7) == b"1 gate\n"
        assert b"2 next\n" in read(one, 9)  # the rest is what the other task sends


def test_grace_limits_the_wait(run: Run) -> None:
    with run("hangs", 0.1) as manager, client(manager) as one:
        assert ask(one, b"a\n") == b"a\n"
        with client(manager) as other:
            other.sendall(b"incomple")
            manager.restart()
            assert ask(other, b"te\n") == b"incomplete\n"
            assert read(one, 1) == b""
            assert "closing 1 connection that still had work to do after 0.1 s" in manager.output
            assert "handed over: False" in manager.output


def test_handler_that_only_writes_does_not_prevent_a_restart(run: Run) -> None:
    with run("floods", 0.5) as manager, client(manager) as slow, client(manager) as fast:
        drain = Thread(target=read, args=(fast, 2**40))
        drain.start()
        assert read(slow, 1)
        manager.restart()
        assert "closing 2 connections that still had work to do" in manager.output
        manager.stop()
        with suppress(ConnectionResetError):
            drain.join(DEADLINE)
        assert not drain.is_alive()


def test_handler_that_only_writes_can_be_interrupted(run: Run) -> None:
    with run("counts") as manager, client(manager) as one:
        expected = b"".join(b"%d %s\n" % (i, b"x" * 1000) for i in range(1, 20001))
        got = read(one, 10**6)
        manager.restart()
        got += read(one, 10**7)
        manager.restart()
        got += read(one, len(expected) - len(got))
        assert got == expected


def test_connection_that_is_being_closed_gets_all(run: Run, tmp_path: Path) -> None:
    """And the handler may finish what it does besides."""
    with run("closes") as manager, client(manager, 2**15) as one:
        one.sendall(b"a\n")
        says(manager, "closed")
        manager.send(signal.SIGUSR2)
        until(lambda: manager.is_stopping)
        (tmp_path / "gate").touch()
        assert manager.wait() == 0
        assert "through the gate" in manager.output
        manager.start()
        assert read(one, 2**24) == b"x" * 2**23


def test_half_closed_connection_remains_half_open(run: Run) -> None:
    with run("half_closes") as manager, client(manager, 2**15) as one:
        one.sendall(b"a\n")
        says(manager, "half-closed")
        manager.restart()
        assert read(one, 2**24) == b"x" * 2**23
        one.sendall(b"b\n")
        says(manager, "received b'b\\n'")
        manager.restart()
        one.sendall(b"c\n")
        says(manager, "received b'c\\n'")


@once
def test_handler_can_tell_a_restart_from_the_end(run: Run) -> None:
    with run("tells") as manager, client(manager) as one:
        assert ask(one, b"a\n") == b"a\n"
        manager.restart()
        says(manager, "handed over: True")
        one.sendall(b"b\n")
        one.shutdown(socket.SHUT_WR)
        assert read(one, 100) == b"b\nlost"
        says(manager, "handed over: False")


@once
def test_name_of_the_listener_is_handed_over(run: Run) -> None:
    with run("named") as manager, client(manager) as one:
        assert ask(one, b"a\n") == b"test.socket\n"
        manager.restart()
        assert ask(one, b"a\n") == b"test.socket\n"


def test_last_words_of_an_interrupted_handler_go_nowhere(run: Run) -> None:
    with run("tells") as manager, client(manager, 2**15) as one:
        one.sendall(b"long\n")
        assert one.recv(1) == b"x"
        manager.restart()
        says(manager, "handed over: True")
        one.sendall(b"a\n")
        assert read(one, 2**23 + 1) == b"x" * (2**23 - 1) + b"a\n"


@once
@pytest.mark.parametrize("name", ["strings", "silent"])
def test_state_that_cannot_be_told_costs_its_own_connection(run: Run, name: str) -> None:
    with run(name) as manager, client(manager) as one, client(manager) as other:
        assert ask(one, b"a\n")
        assert ask(one, b"string\n")
        assert ask(other, b"a\n")
        manager.restart()
        assert read(one, 1) == b""
        assert ask(other, b"b\n").endswith(b"b\n")
        says(manager, "closing a connection that cannot be handed over")


def test_client_that_resets_is_no_error(run: Run) -> None:
    with run("lines") as manager, client(manager) as one:
        assert ask(one, b"a\n") == b"1 a\n"
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        one.close()
        manager.restart()
        manager.stop()
        assert manager.output == "served\nserved\n"


@once
def test_failed_reload_is_logged_and_completes(run: Run, tmp_path: Path) -> None:
    with run("lines") as manager, client(manager) as one:
        manager.reload()
        says(manager, "RuntimeError: no gate")
        (tmp_path / "gate").touch()
        manager.reload()
        says(manager, "reloaded")
        assert ask(one, b"a\n") == b"1 a\n"


def test_tls_is_refused(run: Run) -> None:
    with run("upgrades") as manager, client(manager) as one:
        assert b"let a proxy in front terminate TLS\n" in ask(one, b"")


@once
def test_state_that_cannot_be_used_costs_its_own_connection(run: Run) -> None:
    with run("broken") as manager, client(manager) as one, client(manager) as other:
        assert ask(one, b"a\n") == b"1 a\n"
        assert ask(other, b"a\n") == b"1 a\n"
        assert ask(one, b"b\n") == b"2 b\n"
        manager.restart()
        assert read(one, 1) == b""
        assert ask(other, b"b\n") == b"1 b\n"
        says(manager, "a state that cannot be used")
