"""The example daemons of outlive under load: what a restart and a stop do to their clients.

With SOAK=1, there are as many connections as one process may have, and more restarts.
"""

import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from integration.client import ask
from integration.daemon import ROOT
from integration.measures import SOAK
from load.numbered import BRIEF, SLOW, Numbered
from outlive.testing import Manager
from waiting import DEADLINE, until

CONNECTIONS, RESTARTS = (2000, 20) if SOAK else (200, 2)
SMALL = 200  # descriptors
NAMES = ("counter", "acounter")

Run = Callable[..., Manager]


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text("")
    return path


@pytest.fixture(params=NAMES)
def run(request: pytest.FixtureRequest, settings: Path) -> Run:
    """Makes a manager of an example."""
    return partial(manage, request.param, settings)


def manage(name: str, settings: Path, **options: Any) -> Manager:
    program = str(ROOT / "examples" / f"{name}.py")
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = (sys.executable, program, str(settings))
    return Manager(*command, environ=environ, timeout=DEADLINE, **options)


@pytest.fixture
def clients() -> Iterator[Callable[[Manager], socket.socket]]:
    """Makes clients, and closes them."""
    with ExitStack() as stack:
        yield lambda manager: stack.enter_context(manager.connect())


@pytest.mark.parametrize("name", [*NAMES, "tcounter"])
@pytest.mark.usefixtures("many_in_flight")
def test_restarts_under_load(name: str, settings: Path) -> None:
    if name == "tcounter" and not find_spec("trio"):
        pytest.skip("trio is not installed (pip install trio)")
    with manage(name, settings) as manager, Numbered.against(manager.address, CONNECTIONS) as load:
        for _ in range(RESTARTS):
            manager.restart()
            load.go_on()
        report = load.finish()
    assert report.faults == {}
    assert report.open == CONNECTIONS
    assert report.visits


@pytest.mark.usefixtures("many_in_flight")
def test_restarts_without_a_pause_under_load(run: Run) -> None:
    """Some of them while the process before is still taking over."""
    with run() as manager, Numbered.against(manager.address, CONNECTIONS) as load:
        for _ in range(24 if SOAK else 8):
            manager.restart()
        load.go_on()
        report = load.finish()
    assert report.faults == {}
    assert report.open == CONNECTIONS


def test_mistake_in_the_settings_ends_nothing(run: Run, settings: Path) -> None:
    settings.write_text('prefix = "a "')
    with run() as manager, manager.connect() as client:
        assert ask(client, b"one\n") == b"a 1 eno\n"
        settings.write_text("prefix = ")
        manager.restart()
        until(lambda: "is invalid; using the last good configuration" in manager.status)
        assert ask(client, b"two\n") == b"a 2 owt\n"
        manager.reload()
        assert ask(client, b"three\n") == b"a 3 eerht\n"
        settings.write_text('prefix = "b "')
        manager.reload()
        assert ask(client, b"four\n") == b"b 4 ruof\n"


def test_start_with_a_mistake_fails(run: Run, settings: Path) -> None:
    settings.write_text("prefix = ")
    with pytest.raises(AssertionError, match="exit status 78"), run():
        pass


@pytest.mark.usefixtures("small_limit")
def test_clients_wait_for_descriptors(
    run: Run, clients: Callable[[Manager], socket.socket]
) -> None:
    with run(descriptors=SMALL) as manager:
        everyone = [clients(manager) for _ in range(SMALL)]
        for client in everyone:
            client.sendall(b"one\ntw")
        until(lambda: "new clients wait" in manager.output)
        manager.restart()
        served: list[socket.socket] = []
        until(lambda: answered(everyone, served) and "new clients wait" in manager.output)
        assert SMALL // 4 < len(served) < SMALL
        for client in served:
            assert ask(client, b"o\n") == b"2 owt\n"
            client.close()
        for client in everyone:
            if client not in served:
                assert ask(client, b"o\n") in (b"1 eno\n2 owt\n", b"1 eno\n")


def answered(clients: list[socket.socket], served: list[socket.socket]) -> bool:
    """Add the clients that have received the answer to their first line to those that are
    `served`; whether there are any in addition."""
    for client in clients:
        if client not in served:
            client.settimeout(0)
            try:
                if client.recv(6, socket.MSG_PEEK) == b"1 eno\n":
                    served.append(client)
                    assert client.recv(6) == b"1 eno\n"
            except BlockingIOError:
                pass
            client.settimeout(DEADLINE)
    return bool(served)


def test_without_a_store_a_restart_is_a_stop(run: Run) -> None:
    with run(store=0) as manager, manager.connect() as client:
        assert ask(client, b"one\ntw") == b"1 eno\n"
        manager.send(signal.SIGUSR2)
        assert client.recv(1) == b""
        client.close()
        assert manager.wait() == 0
        manager.start()


def test_stop_answers_all_and_resets_nothing(run: Run) -> None:
    with run() as manager, Numbered.against(manager.address, CONNECTIONS) as load:
        manager.send(signal.SIGTERM)
        until(lambda: load.report().open == 0)
        report = load.report()
        # Those that read slowly may have too much to read for the time that a stop takes.
        assert report.faults.pop("reset", 0) <= CONNECTIONS // SLOW
        assert report.faults.keys() == {"ended"}
        assert manager.wait() == 0


def test_killed_process_costs_its_own_connections_only(run: Run) -> None:
    with run() as manager, manager.connect() as client:
        assert ask(client, b"one\n") == b"1 eno\n"
        manager.kill()
        with manager.connect() as waiting:
            waiting.sendall(b"new\n")
            manager.start()
            assert ask(waiting, b"") == b"1 wen\n"
            manager.restart()
            assert ask(waiting, b"two\n") == b"2 owt\n"
        assert client.recv(1) == b""


def test_unread_answers_outlive_restarts(run: Run) -> None:
    """The client has sent far more than the buffers hold, and reads only after the restart."""
    lines = [b"%d-" % number + b"x" * 1000 for number in range(8000)]
    answers = b"".join(b"%d %s\n" % (i, line[::-1]) for i, line in enumerate(lines, 1))
    with run() as manager, manager.connect() as client:
        sender = Thread(target=client.sendall, args=[b"\n".join(lines) + b"\n"])
        sender.start()
        manager.restart()
        manager.restart()
        received = bytearray()
        while len(received) < len(answers) and (data := client.recv(2**16)):
            received += data
        sender.join()
        assert received == answers


def test_process_that_exits_hides_no_other_failure(run: Run) -> None:
    """The manager ends it only if it is still running."""
    with pytest.raises(ZeroDivisionError):
        fail_after_exit(run)


def fail_after_exit(run: Run) -> None:
    with run() as manager:
        process = Path(f"/proc/{manager.pid}")
        manager.send(signal.SIGTERM)
        until(lambda: not process.exists())
        raise ZeroDivisionError


def test_connections_that_wait_to_be_accepted_are_not_taken_for_open() -> None:
    """A stop leaves them in the accept queue, for the process that they then start."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, ExitStack() as stack:
        load = Numbered.against(listener.getsockname(), 5)
        stack.push(load)  # which would wait for answers
        until(lambda: queued(listener) == 5 + BRIEF)
        assert load.report().open == 0


def queued(listener: socket.socket) -> int:
    """Connections in the accept queue: tcpi_unacked of a listening socket, tcp(7)."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
    return int(struct.unpack_from("=I", info, 24)[0])
