"""What `outlive.Service` promises, shown by a daemon that numbers lines."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from integration.client import Client
from integration.daemon import PASS_SOCKETS, ROOT
from integration.descriptor_limit import limited
from integration.processes import stopped
from integration.service import Service
from outlive.channel import SEND_END, Format, send
from outlive.intake import CLIENTS
from waiting import DEADLINE, until

NUMBERING = ROOT / "tests/integration/numbering.py"


class Numbering:
    """A context manager that runs the daemon; its end is a stop for a restart."""

    def __init__(
        self,
        service: Service,
        log: Path,
        *words: str,
        settings: str = "",
        wrapper: Sequence[str] = (),
    ) -> None:
        self.service = service
        self.log = log
        self.words = words
        self.settings = settings
        self.wrapper = wrapper
        self.ended_by = signal.SIGUSR2
        self.status = 0

    def start(self) -> None:
        """Start it, without waiting."""
        passed = [("one.socket", self.service.listener), *self.service.manager.stored.items()]
        numbers = [one.fileno() for _, one in passed]
        names = ":".join(name for name, _ in passed)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", PASS_SOCKETS, ",".join(map(str, numbers)), names),
                    *self.wrapper,
                    *(sys.executable, str(NUMBERING), self.settings, *self.words),
                ],
                env=os.environ | self.service.manager.environment | {"PYTHONPATH": str(ROOT)},
                stderr=log,
                pass_fds=numbers,
            )

    def run(self) -> int:
        """Run one that is expected to exit by itself; its exit status."""
        self.start()
        try:
            return self.process.wait(DEADLINE)
        finally:
            self._kill()

    def __enter__(self) -> Self:
        self.start()
        with ExitStack() as unless_ready:
            unless_ready.push(self)
            self.service.manager.wait("READY=1")  # which follows what is stored
            unless_ready.pop_all()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if not kind:
                self.process.send_signal(self.ended_by)
                assert self.process.wait(DEADLINE) == self.status, self.text
        finally:
            self._kill()

    def _kill(self) -> None:
        """Leave no process: it would keep descriptors in flight."""
        self.process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.mark.usefixtures("many_in_flight")
def test_restart_keeps_everything(service: Service, log: Path) -> None:
    with Numbering(service, log):
        clients = [service.connect() for _ in range(600)]
        for client in clients:
            assert client.ask(b"a line") == b"1 a line"
            client.send(b"half ")
    for number in (2, 3):
        with Numbering(service, log):
            for client in clients:
                assert client.ask(b"a line") == b"%d half a line" % number
                client.send(b"half ")
    assert "left 600 connections" in log.read_text()


def test_slow_reader_loses_nothing(service: Service, log: Path) -> None:
    """Megabytes of answers are unsent, and as many lines unread, when it is restarted twice."""
    lines = b"".join(b"%06d %s\n" % (number, b"x" * 1000) for number in range(8000))
    slow = service.connect(4096)
    sender = threading.Thread(target=slow.send, args=[lines])
    with Numbering(service, log):
        sender.start()
        assert slow.read_line() == b"1 000000 " + b"x" * 1000 + b"\n"
    with Numbering(service, log):
        slow.read_line()
    with Numbering(service, log):
        for number in range(3, 8001):
            assert slow.read_line() == b"%d %06d %s\n" % (number, number - 1, b"x" * 1000)
    sender.join()


def test_listener_name_and_address_are_known_after_restarts(service: Service, log: Path) -> None:
    """Whether the program leaves what it was given, or only a socket and bytes."""
    client = service.connect()
    for number, words in enumerate(([], [], ["pairs"], ["pairs"], []), 1):
        with Numbering(service, log, *words):
            assert client.ask(b"listener") == b"%d one.socket" % number


def test_items_with_several_descriptors_or_none(service: Service, log: Path) -> None:
    with Numbering(service, log, "items", "files"):
        client = service.connect()
        assert client.ask(b"one") == b"1 one"
    with Numbering(service, log):
        assert client.ask(b"files") == b"2 with files"
    assert "item: b'bytes alone', []\n" in log.read_text()
    assert "item: b'an item', [b'first', b'second']\n" in log.read_text()


def test_state_that_kills_the_process_costs_its_own_connection(
    service: Service, log: Path
) -> None:
    with Numbering(service, log):
        clients = [service.connect() for _ in range(30)]
        for number, client in enumerate(clients):
            assert client.ask(b"one") == b"1 one"
            client.send(b"poison " if number == 20 else b"good ")
    assert Numbering(service, log, "fragile").run() == 3
    with Numbering(service, log):
        for client in clients[21:]:
            assert client.ask(b"line") == b"2 good line"
        for client in clients[:21]:  # those before it had already been served by the one that died
            client.wait_for_end()
    assert "closing 21 connections: the previous process died while it restored" in log.read_text()


def test_process_that_never_gets_to_its_connections_costs_none(
    service: Service, log: Path
) -> None:
    with Numbering(service, log):
        client = service.connect()
        assert client.ask(b"one") == b"1 one"
    assert Numbering(service, log, settings="/nonexistent").run() == 78
    with Numbering(service, log):
        assert client.ask(b"two") == b"2 two"


def test_stop_answers_what_has_arrived(service: Service, log: Path) -> None:
    with Numbering(service, log) as daemon:
        daemon.ended_by = signal.SIGCONT  # nothing else has to end it
        client, silent = service.connect(), service.connect()
        assert client.ask(b"one") == b"1 one"
        daemon.process.send_signal(signal.SIGSTOP)
        client.send(b"two\nthree\nhalf")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.send_signal(signal.SIGCONT)
        assert client.read_to_end() == b"2 two\n3 three\n"
        assert silent.read_to_end() == b""
        client.close()
        silent.close()
        service.manager.wait("EXTEND_TIMEOUT_USEC=6000000")


def test_stop_leaves_the_accept_queue_to_the_next_process(service: Service, log: Path) -> None:
    """All but the clients that the process was about to accept."""
    with Numbering(service, log) as daemon:
        daemon.ended_by = signal.SIGCONT  # nothing else has to end it
        with stopped(daemon.process.pid):
            clients = [service.connect() for _ in range(CLIENTS + 10)]
            for client in clients:
                client.send(b"one\n")
            daemon.process.send_signal(signal.SIGTERM)
        for client in clients[:CLIENTS]:
            assert client.read_to_end() == b"1 one\n"
            client.close()
    with Numbering(service, log):
        for client in clients[CLIENTS:]:
            assert client.read_line() == b"1 one\n"
            assert client.ask(b"two") == b"2 two"


def test_nothing_follows_an_order_to_exit() -> None:
    """Of several orders, a reload comes first, and is the only one that the process survives."""
    code = (
        "from outlive import Order, Service; from signal import *\n"
        "service = Service('alone', signals=False)\n"
        "for number in (SIGTERM, SIGHUP, SIGUSR2): service.obey(number)\n"
        "assert list(service.events()) == [Order.RELOAD, Order.END]\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=DEADLINE)


def test_stop_resets_those_who_do_not_read(service: Service, log: Path) -> None:
    with Numbering(service, log) as daemon:
        daemon.ended_by = signal.SIGTERM
        slow = service.connect(4096)
        slow.socket.setblocking(False)
        lines = b"a line of some length\n" * 1000
        until(lambda: not _sends(slow, lines))
    slow.socket.settimeout(DEADLINE)
    with pytest.raises(ConnectionResetError):
        slow.read_to_end()
    assert "resetting 1 connection with unsent answers" in log.read_text()


def _sends(client: Client, data: bytes) -> int:
    """The number of bytes that are sent within a moment; nothing is read."""
    try:
        return client.socket.send(data)
    except BlockingIOError:
        return 0


def test_restart_that_was_a_stop_is_noticed(service: Service, log: Path) -> None:
    with Numbering(service, log) as daemon:
        daemon.ended_by = signal.SIGTERM
    with Numbering(service, log):
        service.manager.wait("STATUS=.*set RestartKillSignal=SIGUSR2 in the unit")


def test_without_a_store_a_restart_is_a_stop(service: Service, log: Path) -> None:
    service.manager.room = 0
    with Numbering(service, log):
        client = service.connect()
        assert client.ask(b"one") == b"1 one"
        client.end()
    assert client.read_to_end() == b""
    assert "for the next process" not in log.read_text()


@pytest.mark.usefixtures("small_limit")
def test_lower_limit_is_told_and_costs_waiting_connections_nothing(
    service: Service, log: Path
) -> None:
    """They are in flight, so that none can be added to them: new ones are served, but end with the
    process."""
    with Numbering(service, log, wrapper=limited(1000)):
        clients = [service.connect() for _ in range(100)]
        for client in clients:
            assert client.ask(b"one") == b"1 one"
    with Numbering(service, log, wrapper=limited(96)) as daemon:
        service.manager.wait("STATUS=numbering lines; connections of the previous process wait.*")
        new = service.connect()
        assert new.ask(b"one") == b"1 one"
        daemon.process.send_signal(signal.SIGUSR2)
        daemon.ended_by = signal.SIGCONT  # nothing else has to end it
        assert new.read_to_end() == b""
        new.close()
    assert "not everything can be left for the next process: " in log.read_text()
    with Numbering(service, log, wrapper=limited(1000)):
        for client in clients:
            assert client.ask(b"two") == b"2 two"


@pytest.mark.usefixtures("small_limit")
def test_waiting_connections_are_served_once_there_is_room(service: Service, log: Path) -> None:
    """They are left in two messages, of which only one fits into the next process."""
    with Numbering(service, log, "limit=160"):
        clients = [service.connect() for _ in range(60)]
        for client in clients:
            assert client.ask(b"one") == b"1 one"
    for client in clients:
        client.send(b"two\n")
    with Numbering(service, log, "limit=96"):
        service.manager.wait("STATUS=numbering lines; connections of the previous process wait.*")
        unserved = set(clients)
        until(lambda: not _close_served(unserved))
        service.manager.wait("STATUS=numbering lines")


def _close_served(clients: set[Client]) -> set[Client]:
    """Close the clients that have received an answer, and return the others."""
    ready, _, _ = select.select([client.socket for client in clients], [], [], 0)
    for client in [client for client in clients if client.socket in ready]:
        assert client.read_line() == b"2 two\n"
        client.close()
        clients.remove(client)
    return clients


@pytest.mark.usefixtures("small_limit")
def test_full_process_lets_new_clients_wait(service: Service, log: Path) -> None:
    with Numbering(service, log, "limit=96") as daemon:
        clients = [service.connect() for _ in range(80)]
        for client in clients:
            client.send(b"one\n")
        assert clients[0].read_line() == b"1 one\n"
        until(lambda: "new clients wait: " in daemon.text)
        for client in clients[:60]:
            client.close()
        for client in clients[60:]:
            assert client.read_line() == b"1 one\n"
        warnings = daemon.text.count("new clients wait: ")
        for _ in range(60):
            service.connect().send(b"one\n")
        until(lambda: daemon.text.count("new clients wait: ") > warnings)


def test_invalid_settings_end_nothing(service: Service, log: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text("5")
    with Numbering(service, log, settings=str(settings)):
        until(lambda: "settings" in service.manager.stored)
    settings.write_text("five")
    with Numbering(service, log, settings=str(settings)) as daemon:
        problem = f"{settings} is invalid; using the last good configuration"
        assert service.manager.status == f"numbering lines; {problem}"
        settings.write_text("6")
        daemon.process.send_signal(signal.SIGHUP)
        service.manager.wait("READY=1")
        assert service.manager.status == "numbering lines"
    assert re.findall(r"^settings: (\d)$", log.read_text(), re.MULTILINE) == ["5", "5", "6"]


def test_memory_outlives_even_a_kill(service: Service, log: Path) -> None:
    with Numbering(service, log) as daemon:
        daemon.process.send_signal(signal.SIGHUP)
        service.manager.wait("READY=1")
        until(lambda: "memory" in service.manager.stored)
        daemon.ended_by, daemon.status = signal.SIGKILL, -signal.SIGKILL
    with Numbering(service, log):
        pass
    assert "remembered: b'reloaded'" in log.read_text()


def test_reload_before_a_restart_is_not_lost(service: Service, log: Path) -> None:
    """Both signals wait for the process, and the kernel delivers them in another order."""
    with Numbering(service, log) as daemon, stopped(daemon.process.pid):
        daemon.process.send_signal(signal.SIGUSR2)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.ended_by = signal.SIGCONT  # nothing else has to end it
    until(lambda: "memory" in service.manager.stored)


def test_reload_is_as_notify_reload_asks(service: Service, log: Path) -> None:
    """One message says that it begins and when; READY=1 says that it is over."""
    with Numbering(service, log) as daemon:
        daemon.process.send_signal(signal.SIGHUP)
        begun = service.manager.wait("RELOADING=1")
        assert re.fullmatch(r"MONOTONIC_USEC=\d+", begun.lines[1])
        service.manager.wait("READY=1")


def test_connections_of_another_format_are_closed_cleanly(service: Service, log: Path) -> None:
    with Numbering(service, log):
        whole = service.connect()
        assert whole.ask(b"one") == b"1 one"
    lost = service.connect()
    request, _ = service.listener.accept()
    lost.send(b"unread\n")
    with request:
        form = Format(b"numbering", 2)
        send(service.manager.stored[SEND_END], form, [request], lambda file: file.write(b"?"))
    with Numbering(service, log):
        assert lost.read_to_end() == b""
        assert whole.ask(b"two") == b"2 two"
    assert "closing 1 connection whose state cannot be restored: " in log.read_text()


def test_watchdog_is_served_by_the_loop(service: Service, log: Path) -> None:
    service.manager.environment["WATCHDOG_USEC"] = (
        "4000"  # so short that SIGALRM comes at its exit
    )
    with Numbering(service, log):
        service.manager.wait("WATCHDOG=1")
        service.manager.wait("WATCHDOG=1")


def test_connections_of_accept_yes_are_clients(service: Service, log: Path) -> None:
    client = service.connect()
    request, _ = service.listener.accept()
    service.manager.stored["connection"] = request
    with Numbering(service, log):
        service.manager.forget("connection")
        assert client.ask(b"one") == b"1 one"


def test_it_runs_without_a_service_manager() -> None:
    code = (
        "from outlive import Client, Order, Service; import select\n"
        "service = Service('alone', listen=('127.0.0.1', 0)); service.ready()\n"
        "print(service.listeners[0].socket.getsockname()[1], flush=True); clients = []\n"
        "while True:\n"
        "    select.select([service], [], [])\n"
        "    for event in service.events():\n"
        "        if event is Order.END:\n"
        "            service.end((one.socket, b'bye') for one in clients); raise SystemExit\n"
        "        assert isinstance(event, Client); clients.append(event)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port)) as client:
            process.terminate()  # perhaps before the client was accepted
            assert client.recv(10) == b"bye"
    assert process.returncode == 0


def test_without_descriptors_everything_is_returned() -> None:
    code = (
        "from outlive import Service; import resource, socket\n"
        "service = Service('alone'); one, other = socket.socketpair()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))\n"
        "assert service.leave([(one, b'')]) == [(one, b'')]\n"
        "assert one.send(b'still open') == len(other.recv(100))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "nothing can be left for the next process: " in result.stderr
    assert "LimitNOFILE=" in result.stderr
