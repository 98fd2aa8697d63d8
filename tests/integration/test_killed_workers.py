"""The connections of a worker that is killed are served by the others, from where it stopped."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from integration.client import Client, name_of
from integration.daemon import Daemon
from integration.measures import scaled
from integration.processes import cannot, descriptors, is_running, state, stopped
from integration.service import Service
from proxy_headers import binary
from tcpupperd.serving.fast_path import SWITCH
from waiting import until

DYING = Path(__file__).with_name("dying.py")

SIGNALS = [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS]


@pytest.fixture(params=["c", "python"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the C module, if it was built, and without."""
    if request.param == "python":
        monkeypatch.setenv(SWITCH, "1")
    return str(request.param)


#: For what does not depend on it.
once = pytest.mark.parametrize("implementation", ["c"], indirect=True)


class Faulty(Daemon):
    """A daemon with something wrong with it."""

    def __init__(self, fault: str, **settings: Any) -> None:
        super().__init__(**settings)
        at = self.command.index("-m")
        self.command[at : at + 2] = [str(DYING), fault]


def kill(daemon: Daemon, number: int = signal.SIGKILL) -> None:
    """Kill all workers, and wait for others."""
    killed = daemon.all_workers()
    for worker in killed:
        os.kill(worker, number)
    until(lambda: not set(daemon.all_workers()) & set(killed))


def settled(daemon: Daemon, **counts: int) -> None:
    """Wait for these counters."""
    until(lambda: counts.items() <= daemon.counters().items())


#: Without the C module, any other signal counts as a fault of the worker.
KILLED = [*(("c", number) for number in SIGNALS), ("python", signal.SIGKILL)]


@pytest.mark.parametrize(("implementation", "number"), KILLED, indirect=["implementation"])
@pytest.mark.usefixtures("many_in_flight")
def test_between_lines(number: int) -> None:
    with Daemon() as daemon:
        clients = [daemon.connect() for _ in range(50)]
        for word in (b"one", b"two", b"three"):
            assert [client.ask(word) for client in clients] == [word.upper()] * 50
            kill(daemon, number)
        assert [client.ask(b"end") for client in clients] == [b"END"] * 50
        settled(daemon, open=50, worker_died=0)
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize("size", [1, 5000, 200_000], ids=["short", "long", "very long"])
def test_in_the_middle_of_a_line(size: int) -> None:
    with Daemon() as daemon:
        client = daemon.connect()
        client.send(b"one\n" + b"x" * size)
        assert client.read_line() == b"ONE\n"
        settled(daemon, received_bytes=4 + size)
        kill(daemon)
        client.send(b"y" * size)
        settled(daemon, open=1)
        kill(daemon)
        assert client.ask(b"!") == b"X" * size + b"Y" * size + b"!"


def test_while_input_waits() -> None:
    """Many lines, and the rest of one, the end of input after it."""
    with Daemon(workers=1) as daemon:
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        settled(daemon, lines=1)
        with stopped(*daemon.workers()):
            client.send(b"line\n" * 1000 + b"rest")
            client.end()
            os.kill(daemon.workers()[0], signal.SIGKILL)
        assert client.read_to_end() == b"LINE\n" * 1000 + b"REST"
        settled(daemon, lines=1002, client_closed=1)


def test_with_answers_that_nobody_reads_yet() -> None:
    with Daemon() as daemon:
        clients = [daemon.connect(receive_buffer=4096) for _ in range(3)]
        sent = [daemon.clog(client) for client in clients]
        kill(daemon)
        settled(daemon, open=3)
        kill(daemon)
        for client, text in zip(clients, sent, strict=True):
            client.end()
            assert client.read_to_end() == text.upper()
        settled(daemon, worker_died=0)


@pytest.mark.parametrize("framing", ["line", "none"])
def test_limit_on_lines_holds(framing: str) -> None:
    with Daemon(lines_per_connection=3, framing=framing) as daemon:
        client = daemon.connect()
        for word in (b"one", b"two"):
            assert client.ask(word) == word.upper()
            kill(daemon)
        client.send(b"three\n")
        assert client.read_line() == b"THREE\n"
        client.send(b"four\n")
        assert client.read_to_end() == b""


def test_connection_that_the_server_has_ended_stays_ended() -> None:
    with Daemon(lines_per_connection=1, log_connections=True, log_level="info") as daemon:
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        kill(daemon)
        client.send(b"two\n")
        assert client.read_to_end() == b""
        client.close()
        until(lambda: ": complete after 1 line in " in daemon.log)


def test_log_tells_of_all_lines() -> None:
    with Daemon(log_connections=True) as daemon:
        client = daemon.connect()
        for word in (b"one", b"two", b"three"):
            assert client.ask(word) == word.upper()
        port = client.port
        time.sleep(0.2)  # the age of the connection when its worker dies, which must not be lost
        kill(daemon)
        assert client.ask(b"four") == b"FOUR"
        client.close()
        until(lambda: f"{port}: client closed after 4 lines in " in daemon.log)
        assert float(daemon.log.rpartition(" lines in ")[2].split()[0]) >= 0.2


def test_greeting_is_sent_once() -> None:
    with Daemon(greeting="hello {client}") as daemon:
        clients = [daemon.connect() for _ in range(20)]
        greetings = [client.read_line() for client in clients]
        assert all(line.startswith(b"hello 127.0.0.1") for line in greetings)
        kill(daemon)
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 20


def test_header_of_a_load_balancer() -> None:
    header = binary()
    with Daemon(listen=["proxy=127.0.0.1:0"], log_connections=True) as daemon:
        address = daemon.addresses[0].removeprefix("proxy=")
        whole, begun = daemon.connect(address), daemon.connect(address)
        whole.send(header + b"one\nrest")
        assert whole.read_line() == b"ONE\n"
        begun.send(header[:20])
        settled(daemon, received_bytes=len(header) + 8 + 20)
        kill(daemon)
        begun.send(header[20:])
        assert begun.ask(b"two") == b"TWO"
        kill(daemon)
        assert whole.ask(b"!") == b"REST!"
        assert begun.ask(b"three") == b"THREE"
        whole.close()
        until(lambda: " after 2 lines in " in daemon.log)


def test_urgent_data_is_answered_like_the_rest() -> None:
    """So that the counts of the kernel include nothing else."""
    with Daemon() as daemon:
        client = daemon.connect()
        for _ in range(2):
            client.send(b"one ")
            client.socket.send(b"two ", socket.MSG_OOB)
            assert client.ask(b"three") == b"ONE TWO THREE"
            client.send(b"ha")
            kill(daemon)
            assert client.ask(b"lf") == b"HALF"
        settled(daemon, worker_died=0)


@once
def test_multipath_tcp() -> None:
    """Such sockets have no option for urgent data."""
    try:
        listening = socket.socket(proto=socket.IPPROTO_MPTCP)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 1)
    except OSError as error:
        cannot(f"the kernel has no Multipath TCP, or an early version: {error}")
    with listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with Daemon(passed=[("tcpupperd.socket", listening)]) as daemon:
            client = daemon.connect(name_of(listening))
            assert client.ask(b"one") == b"ONE"
            client.send(b"ha")
            kill(daemon)
            assert client.ask(b"lf") == b"HALF"


def test_local_clients(tmp_path: Path) -> None:
    """The kernel counts nothing for Unix sockets: the ledger alone has to do."""
    with Daemon(listen=[f"{tmp_path}/socket"]) as daemon:
        clean, begun = daemon.connect(), daemon.connect()
        assert clean.ask(b"one") == b"ONE"
        begun.send(b"ha")
        settled(daemon, received_bytes=6)
        kill(daemon)
        assert begun.ask(b"lf") == b"HALF"
        assert clean.ask(b"two") == b"TWO"
        settled(daemon, worker_died=0)


def test_requests_for_pages() -> None:
    with Daemon(listen=["127.0.0.1:0", "metrics=127.0.0.1:0"]) as daemon:
        address = daemon.addresses[1].removeprefix("metrics=")
        client = daemon.connect(address)
        client.send(b"GET /live HT")
        settled(daemon, received_bytes=12)
        kill(daemon)
        client.send(b"TP/1.1\r\nHost: x\r\n\r\n")
        assert client.read_to_end().startswith(b"HTTP/1.1 200 OK\r\n")


@once
@pytest.mark.usefixtures("many_in_flight")
def test_handover_of_a_worker_that_is_killed_meanwhile(service: Service) -> None:
    with service.daemon() as daemon:
        clients = [service.connect() for _ in range(100)]
        for client in clients:
            assert client.ask(b"one") == b"ONE"
            client.send(b"ha")
        settled(daemon, received_bytes=600)
        with stopped(*daemon.workers()):
            daemon.send_signal(signal.SIGUSR2)
            until(daemon.has_dismissed_workers)
            for worker in daemon.workers():
                os.kill(worker, signal.SIGKILL)
        assert daemon.wait() == 0
    with service.daemon() as daemon:
        assert [client.ask(b"lf") for client in clients] == [b"HALF"] * 100


@once
def test_supervisor_and_worker_killed_together(service: Service) -> None:
    with service.daemon() as daemon:
        clients = [service.connect() for _ in range(20)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 20
        workers = daemon.workers()
        with stopped(*workers):
            daemon.send_signal(signal.SIGKILL)
            os.kill(workers[0], signal.SIGKILL)
        daemon.wait()
        until(lambda: not any(map(is_running, workers)))
    with service.daemon() as daemon:
        assert [client.ask(b"two") for client in clients] == [b"TWO"] * 20


def test_incomplete_answer_does_not_look_complete_if_the_supervisor_is_killed_too() -> None:
    """Without a service manager, nothing takes the connection out of the channel."""
    with Daemon(workers=1) as daemon:
        client = daemon.connect(receive_buffer=4096)
        daemon.clog(client)
        (worker,) = daemon.workers()
        with stopped(worker):
            daemon.send_signal(signal.SIGKILL)
            os.kill(worker, signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            client.read_to_end()


def test_connection_that_was_owed_something_is_closed_like_any_other() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect()
        client.send(b"ha")
        settled(daemon, received_bytes=2)
        kill(daemon)
        client.send(b"lf\nmore")
        client.end()
        assert client.read_to_end() == b"HALF\nMORE"
        settled(daemon, client_closed=1, open=0)


@contextmanager
def dead_before_it_is_told(daemon: Daemon, order: int) -> Iterator[None]:
    """What is done here happens before a worker is killed and the supervisor receives an order;
    it learns of both at the same time."""
    worker = daemon.workers()[0]
    with stopped(daemon.pid):
        with stopped(worker):
            yield
            os.kill(worker, signal.SIGKILL)
        until(lambda: state(worker) == "Z")
        daemon.send_signal(order)


def test_worker_killed_just_before_a_stop(service: Service) -> None:
    with service.daemon() as daemon:
        clients = [service.connect() for _ in range(20)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 20
        with dead_before_it_is_told(daemon, signal.SIGTERM):
            for client in clients:
                client.send(b"two\n")
        assert [client.read_to_end() for client in clients] == [b"TWO\n"] * 20
        assert daemon.wait() == 0


def test_worker_killed_just_before_a_restart(service: Service) -> None:
    with service.daemon() as daemon:
        clients = [service.connect() for _ in range(20)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 20
        with dead_before_it_is_told(daemon, signal.SIGUSR2):
            for client in clients:
                client.send(b"two\nha")
        assert daemon.wait() == 0
    with service.daemon() as daemon:
        assert [client.read_line() for client in clients] == [b"TWO\n"] * 20
        assert [client.ask(b"lf") for client in clients] == [b"HALF"] * 20


def test_worker_killed_just_before_a_reload() -> None:
    with Daemon() as daemon:
        clients = [daemon.connect() for _ in range(20)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 20
        with dead_before_it_is_told(daemon, signal.SIGHUP):
            for client in clients:
                client.send(b"two\nha")
        until(lambda: "reloaded: " in daemon.log)
        assert [client.read_line() for client in clients] == [b"TWO\n"] * 20
        assert [client.ask(b"lf") for client in clients] == [b"HALF"] * 20


def test_worker_killed_during_a_stop() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect(receive_buffer=4096)
        sent = daemon.clog(client)
        (worker,) = daemon.workers()
        daemon.send_signal(signal.SIGTERM)
        until(lambda: "stopping: closing 1 connection" in daemon.log)
        os.kill(worker, signal.SIGKILL)
        daemon.wait_for_workers(1, without=worker)
        whole = sent[: sent.rindex(b"\n") + 1]
        assert client.read_to_end() == whole.upper()
        assert daemon.wait() == 0


@once
def test_keeper_that_hands_over_after_a_stop() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        (worker,), (keeper,) = daemon.workers(), daemon.keepers()
        with stopped(keeper):
            os.kill(worker, signal.SIGKILL)
            client.send(b"two\n")
            (other,) = daemon.wait_for_workers(1, without=worker)
            daemon.send_signal(signal.SIGTERM)
            until(lambda: not is_running(other))
        assert client.read_to_end() == b"TWO\n"
        assert daemon.wait() == 0


# Keepers


def has_new_keepers(daemon: Daemon, before: Sequence[int]) -> bool:
    """Whether all workers have other keepers. A worker has the name of its keeper while it starts
    it, so that the keeper never has another."""
    return len(daemon.workers()) == len(before) == len(set(daemon.keepers()) - set(before))


@once
def test_keeper_is_replaced() -> None:
    with Daemon() as daemon:
        clients = [daemon.connect() for _ in range(10)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 10
        for _ in range(3):
            before = daemon.keepers()
            for keeper in before:
                os.kill(keeper, signal.SIGKILL)
            until(partial(has_new_keepers, daemon, before))
        kill(daemon)
        assert [client.ask(b"two") for client in clients] == [b"TWO"] * 10
        settled(daemon, worker_died=0, workers_died_signal=2)


@once
def test_worker_and_keeper_killed_together_are_said_to_be_lost() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        (worker,) = daemon.workers()
        daemon.kill_with_keeper(worker)
        client.wait_for_end()
        settled(daemon, worker_died=1, open=0)
        assert "1 connection lost" in daemon.log or "1 connection of worker" in daemon.log


@once
def test_keeper_does_not_wait_for_room_for_ever() -> None:
    with Faulty("full", workers=1, log_level="info") as daemon:
        clients = [daemon.connect() for _ in range(3)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 3
        kill(daemon)
        for client in clients:
            client.wait_for_end()
        settled(daemon, worker_died=3, handed_over_out=0, open=0)
        assert daemon.log.count("Resource temporarily unavailable") == 3
        assert "3 connections of worker" in daemon.log


def test_keeper_that_fails_resets_the_connections() -> None:
    """A client must not take an incomplete answer for a complete one."""
    with Faulty("broken", workers=1) as daemon:
        clients = [daemon.connect() for _ in range(3)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 3
        kill(daemon)
        for client in clients:
            with pytest.raises(ConnectionResetError):
                client.read_to_end()
        settled(daemon, worker_died=3, handed_over_out=0, open=0)
        assert "bug: the keeper" in daemon.log


def test_keeper_that_is_killed_once_its_worker_is_dead_resets_the_connections() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        (worker,), (keeper,) = daemon.workers(), daemon.keepers()
        with stopped(daemon.pid):
            os.kill(worker, signal.SIGKILL)
            until(lambda: state(keeper) == "S" and not polled(keeper))  # for the verdict
            os.kill(keeper, signal.SIGKILL)
            with pytest.raises(ConnectionResetError):
                client.read_to_end()
        settled(daemon, worker_died=1, open=0)


@once
def test_closed_connection_is_closed_for_the_keeper_too() -> None:
    with Daemon(workers=1, lines_per_connection=1) as daemon:
        (worker,), (keeper,) = daemon.workers(), daemon.keepers()
        before = set(descriptors(worker))
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        client.end()
        assert client.read_to_end() == b""
        until(lambda: set(descriptors(worker)) == set(descriptors(keeper)) == before)


@once
def test_keepers_leave_with_their_workers() -> None:
    with Daemon() as daemon:
        before = daemon.keepers()
        daemon.reload()
        until(lambda: not any(map(is_running, before)))
        assert len(daemon.keepers()) == 2
        daemon.stop()


@once
def test_daemon_works_without_keepers_and_says_so_once() -> None:
    with Faulty("alone") as daemon:
        clients = [daemon.connect() for _ in range(10)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 10
        assert not daemon.keepers()
        kill(daemon)
        for client in clients:
            client.wait_for_end()
        assert daemon.connect().ask(b"two") == b"TWO"
        settled(daemon, worker_died=10)
        what = "the connections of a worker that is killed will be lost"
        assert daemon.log.count(what) == 1
        assert "10 connections lost" in daemon.log or daemon.log.count(" lost, starting") == 2


# What they are called


def shown(pid: int) -> str:
    """The command line that ps(1) shows."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()


def test_each_process_says_what_it_is() -> None:
    with Daemon() as daemon:
        for _ in range(2):
            workers, keepers = daemon.all_workers(), daemon.keepers()
            assert [shown(worker) for worker in workers] == ["tcpupperd: worker"] * 2
            until(lambda: len(daemon.keepers()) == 2)
            assert {shown(keeper) for keeper in daemon.keepers()} == {
                f"tcpupperd: keeper of {worker}" for worker in workers
            }
            for keeper in keepers:  # others are called the same
                os.kill(keeper, signal.SIGKILL)
            until(partial(has_new_keepers, daemon, keepers))
        assert "-m tcpupperd" in shown(daemon.pid)


# Poison


@contextmanager
def poisoned(
    line: bytes, before: Callable[[Daemon], object] = Daemon.all_workers
) -> Iterator[tuple[Daemon, Client]]:
    """A daemon, and a client that sends it this line, after something has happened `before`;
    others are served before and after that."""
    with Faulty("poison", workers=1) as daemon:
        before(daemon)
        clients = [daemon.connect() for _ in range(20)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 20
        bad = daemon.connect()
        bad.send(line)
        yield daemon, bad
        bad.wait_for_end()
        assert [client.ask(b"two") for client in clients] == [b"TWO"] * 20
        settled(daemon, worker_died=1, open=20)


def test_input_that_kills_its_worker_costs_its_own_connection() -> None:
    with poisoned(b"POISON\n") as (daemon, bad):
        bad.wait_for_end()
        settled(daemon, workers_died_signal=1)


def test_signal_to_a_keeper_does_not_excuse_its_worker() -> None:
    """Both share the ledger, which says whether another process has sent a signal."""
    with poisoned(b"POISON\n", before=replace_keepers) as (daemon, _):
        settled(daemon, workers_died_signal=1)


def replace_keepers(daemon: Daemon) -> None:
    """Kill the keeper as if by a fault, and then the next one, which was started later than the
    ledger."""
    for _ in range(2):
        before = daemon.keepers()
        os.kill(before[0], signal.SIGSEGV)
        until(partial(has_new_keepers, daemon, before))


def test_input_that_makes_its_worker_hang_costs_its_own_connection() -> None:
    with poisoned(b"HANG\n") as (daemon, _):
        daemon.configure(drain_timeout=0.5)
        (worker,) = daemon.workers()
        until(lambda: state(worker) == "S" and not polled(worker))
        daemon.send_signal(signal.SIGHUP)


def polled(worker: int) -> bool:
    """Whether a worker waits for events."""
    return "poll" in Path(f"/proc/{worker}/wchan").read_text()


# Deaths at any time


class Talking:
    """Clients that send lines without pause, in pieces; each checks all of its answers."""

    def __init__(self, daemon: Daemon, count: int) -> None:
        self._stop = threading.Event()
        self.problems: list[str] = []
        self.lines = 0
        self._threads = [
            threading.Thread(target=self._talk, args=(daemon.connect(), number))
            for number in range(count)
        ]

    def __enter__(self) -> "Talking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _talk(self, client: Client, number: int) -> None:
        chance = random.Random(number)
        try:
            while not self._stop.is_set():
                size = chance.choice([1, 30, 100, 3000, 100_000])
                line = chance.randbytes(1 + size // 2).hex().encode() + b"\n"
                half = chance.randrange(len(line))
                client.send(line[:half])
                client.send(line[half:])
                assert client.read(len(line)) == line.upper(), "a wrong answer"
                self.lines += 1
            client.end()
            assert client.read_to_end() == b""
        except (OSError, AssertionError, EOFError) as error:
            self.problems.append(repr(error)[:200])


def other_workers(daemon: Daemon) -> None:
    """Wait until some have died or been replaced."""
    before = daemon.workers()
    until(lambda: daemon.workers() != before)


def test_deaths_at_random_lines_of_the_program() -> None:
    """While connections are also handed over by reloads."""
    deaths = scaled(20, 3000)
    with Faulty("line 40000", workers=2) as daemon:
        with Talking(daemon, 20) as talking:
            while (died := daemon.counters().get("workers_died_signal", 0)) < deaths:
                if died % 2 == 0:
                    daemon.send_signal(signal.SIGHUP)
                other_workers(daemon)
        assert not talking.problems
        assert talking.lines
        settled(daemon, worker_died=0)


def test_orders_to_a_lab() -> None:
    with Daemon(listen=["lab=127.0.0.1:0"]) as daemon:
        address = daemon.addresses[0].removeprefix("lab=")
        client = daemon.connect(address)
        client.send(b"wait 1 hello\n")
        settled(daemon, received_bytes=13)
        kill(daemon)
        assert client.read_line() == b'{"text": "hello"}\n'
        settled(daemon, worker_died=0)
