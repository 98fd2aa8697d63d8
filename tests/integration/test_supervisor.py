"""The processes: how they start, are replaced, reload and stop."""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import CLOCK_BOOTTIME, CLOCK_MONOTONIC, clock_gettime, sleep

import pytest

from integration.client import Client, is_refused
from integration.daemon import Daemon
from integration.measures import scaled
from integration.processes import cannot, descriptors, is_running, started, state, stopped
from tcpupperd.words import counted
from tools import need
from waiting import until

# Start


def test_ready_when_every_worker_accepts() -> None:
    with Daemon(workers=4) as daemon:
        assert daemon.manager.messages[0].text == "READY=1"
        workers = daemon.workers()
        assert len(workers) == 4
        for only in workers:  # each of them answers, for it is the only one that can
            others = [pid for pid in workers if pid != only]
            with stopped(*others):
                assert daemon.connect().ask(b"hello") == b"HELLO"


def test_start_fails_with_its_first_worker() -> None:
    with Daemon(workers=1) as daemon:
        daemon.manager.wait("STATUS=.*")
        until(lambda: state(daemon.pid) == "S")  # it has closed the socket for that
        enough = len(descriptors(daemon.pid))
    # One more is enough to start a worker; the worker then lacks one.
    wrapper = ("prlimit", f"--nofile={enough + 1}")
    failing = Daemon(workers=1, wrapper=wrapper)
    status, log = failing.run()
    assert status == 1
    assert "Too many open files" in log
    assert "exited with status 70 before it could accept connections" in log.splitlines()[-1]
    assert not failing.manager.count("READY=1")


# Workers that die


def test_killed_worker_is_replaced_and_ends_no_connection() -> None:
    with Daemon() as daemon:
        places: dict[Client, int] = {}
        while len(places) < 12 or len(set(places.values())) < 2:
            assert len(places) < 1000, "one worker gets all connections"
            client = daemon.connect()
            assert client.ask(b"before") == b"BEFORE"
            places[client] = daemon.worker_of(client)

        killed = daemon.workers()[0]
        for client in places:
            client.send(b"meanwhile\n")
        os.kill(killed, signal.SIGKILL)
        daemon.wait_for_workers(2, without=killed)

        left = list(places.values()).count(killed)
        assert f"worker {killed} was killed by SIGKILL" in daemon.log
        assert f"{counted(left, 'connection')} left to its keeper, starting" in daemon.log
        for client in places:
            assert client.read_line() == b"MEANWHILE\n"
            assert client.ask(b"after") == b"AFTER"
        assert daemon.connect().ask(b"hello") == b"HELLO"


@pytest.mark.usefixtures("many_in_flight")
def test_no_connection_is_refused_while_workers_die() -> None:
    with Daemon() as daemon:
        for _ in range(5):
            victim = daemon.workers()[0]
            with stopped(*daemon.workers()):  # so that all of these wait in the queue
                waiting = [daemon.connect() for _ in range(20)]
                os.kill(victim, signal.SIGKILL)
            daemon.wait_for_workers(2, without=victim)
            assert [client.ask(b"hello") for client in waiting] == [b"HELLO"] * 20


def test_worker_that_dies_before_it_serves_is_replaced_ever_more_slowly() -> None:
    deaths = scaled(4, 9)
    pauses = [min(10.0, 0.1 * 2**number) for number in range(deaths)]
    with Daemon(workers=1) as daemon:
        died: list[float] = []
        born: list[float] = []
        (worker,) = daemon.workers()
        for _ in range(deaths):
            died.append(clock_gettime(CLOCK_BOOTTIME))
            os.kill(worker, signal.SIGKILL)
            (worker,) = daemon.wait_for_workers(1, without=worker)
            born.append(started(worker))

        tick = 1 / os.sysconf("SC_CLK_TCK")
        for pause, death, birth in zip(pauses, died, born, strict=True):
            assert birth - death >= pause - tick
        assert daemon.log.count("before it had served a client") == 1
        daemon.manager.wait(f"STATUS=.*a worker cannot be started .{deaths} attempts.")

        # The last one lives: nothing is wrong any more, and the status says so.
        assert daemon.connect().ask(b"hello") == b"HELLO"
        daemon.send_signal(signal.SIGUSR1)
        until(lambda: "cannot be started" not in daemon.manager.status)


def test_fewer_processors_start_no_workers() -> None:
    """With workers = "auto", their number is that of the time of the start or reload."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        cannot("it needs two processors")
    with Daemon(workers="auto") as daemon:
        workers = daemon.workers()
        assert len(workers) == len(allowed)
        for pid in (daemon.pid, *workers):
            os.sched_setaffinity(pid, allowed[:1])
        for _ in range(10):
            daemon.counters()  # wakes it, so that it checks its workers
        assert daemon.workers() == workers
        daemon.reload()
        daemon.wait_for_workers(1)
        for pid in (daemon.pid, *daemon.workers()):
            os.sched_setaffinity(pid, allowed)
        daemon.counters()
        assert len(daemon.workers()) == 1


# Stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_stop_answers_received_data(number: int) -> None:
    with Daemon(drain_timeout=60) as daemon:
        idle, busy = daemon.connect(), daemon.connect()
        assert idle.ask(b"hello") == b"HELLO"
        assert busy.ask(b"hello") == b"HELLO"
        slow = daemon.connect(receive_buffer=4096)
        sent = daemon.clog(slow)
        with stopped(*daemon.workers()):
            busy.send(b"one\ntwo\nthr")
            queued = [daemon.connect() for _ in range(40)]
            for client in queued:
                client.send(b"queued\n")
            daemon.send_signal(number)
            daemon.manager.wait("STOPPING=1")
            until(daemon.has_dismissed_workers)
        assert idle.read_to_end() == b""
        assert busy.read_to_end() == b"ONE\nTWO\n"
        assert [client.read_to_end() for client in queued] == [b"QUEUED\n"] * 40
        answer = slow.read_to_end()
        assert len(answer) > 65536
        assert sent.upper().startswith(answer)
        for client in daemon.clients:
            client.close()
        assert daemon.wait() == 0
        assert daemon.manager.count("STOPPING=1") == 1
        daemon.manager.wait("EXTEND_TIMEOUT_USEC=62000000")


def test_stop_waits_for_slow_readers_no_longer_than_drain_timeout() -> None:
    with Daemon(drain_timeout=0.5) as daemon:
        daemon.clog(daemon.connect(receive_buffer=4096))
        begun = clock_gettime(CLOCK_MONOTONIC)
        daemon.stop()
        assert clock_gettime(CLOCK_MONOTONIC) - begun >= 0.5


def test_second_signal_stops_immediately() -> None:
    with Daemon(drain_timeout=600) as daemon:
        daemon.clog(daemon.connect(receive_buffer=4096))
        daemon.send_signal(signal.SIGTERM)
        daemon.manager.wait("STOPPING=1")
        daemon.stop()
        assert "second stop signal" in daemon.log


def test_workers_leave_when_their_supervisor_is_killed() -> None:
    with Daemon(drain_timeout=1) as daemon:
        workers = daemon.workers()
        address = daemon.addresses[0]
        idle = daemon.connect()
        assert idle.ask(b"hello") == b"HELLO"
        daemon.clog(daemon.connect(receive_buffer=4096))
        daemon.send_signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        assert idle.read_to_end() == b""
        until(lambda: not any(map(is_running, workers)))
        assert is_refused(address)
        assert daemon.log.count("the supervisor has exited; exiting") == len(workers)


def test_no_worker_waits_for_another_when_their_supervisor_is_killed() -> None:
    """Each learns of it by the end of its own pipe, which no other may hold."""
    with Daemon(drain_timeout=60) as daemon:
        workers = daemon.workers()
        busy: dict[int, Client] = {}

        def all_have_one() -> bool:
            client = daemon.connect(receive_buffer=4096)
            assert client.ask(b"hello") == b"HELLO"
            busy[daemon.worker_of(client)] = client
            return len(busy) == len(workers)

        until(all_have_one)
        for client in busy.values():
            daemon.clog(client)
        daemon.send_signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        until(lambda: daemon.log.count("the supervisor has exited; exiting") == len(workers))
        for client in daemon.clients:
            client.close()
        until(lambda: not any(map(is_running, workers)))


# Other signals


def test_signals_without_a_meaning_are_harmless() -> None:
    meant = {
        *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2),
        *(signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
        # A fault of the program itself.
        *(signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV),
        *(signal.SIGSYS, signal.SIGTRAP),
    }
    with Daemon() as daemon:
        workers = daemon.workers()
        client = daemon.connect()
        for number in signal.valid_signals() - meant:
            daemon.send_signal(number)
        assert daemon.counters()["accepted"] <= 1  # those with a meaning still work
        assert client.ask(b"hello") == b"HELLO"
        until(lambda: state(daemon.pid) == "S")  # it has fetched them all
        assert "stopping" not in daemon.log
        assert daemon.workers() == workers


def test_workers_ignore_signals() -> None:
    with Daemon() as daemon:
        workers = daemon.workers()
        clients = [daemon.connect() for _ in range(20)]
        for pid in workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                os.kill(pid, number)
        assert [client.ask(b"hello") for client in clients] == [b"HELLO"] * 20
        assert daemon.workers() == workers


def test_counters_add_up() -> None:
    with Daemon(max_line=100) as daemon:
        clients = [daemon.connect() for _ in range(20)]
        for client in clients:
            assert client.ask(b"one") == b"ONE"
            client.send(b"two\nthree\nhal")
            assert client.read(10) == b"TWO\nTHREE\n"
        until(lambda: daemon.counters()["lines"] == 60)
        counters = daemon.counters()
        assert counters["open"] == counters["accepted"] == 20
        assert counters["sent_bytes"] == 20 * 14
        assert counters["handed_over_in"] == counters["handed_over_out"] == 0

        daemon.reload()
        # A worker may take some before it is itself told to give all of its own.
        until(
            lambda: (
                daemon.counters()["handed_over_out"] == daemon.counters()["handed_over_in"] >= 20
            )
        )
        for client in clients[:5]:
            client.end()
            assert client.read_to_end() == b"HAL"
        for client in clients[5:8]:
            client.reset()
        until(lambda: daemon.counters()["open"] == 12)
        counters = daemon.counters()
        assert counters["accepted"] == 20
        assert counters["lines"] == 65
        assert counters["sent_bytes"] == 20 * 14 + 5 * 3
        assert counters["reset"] == 3
        assert counters["bug"] == counters["state_unreadable"] == 0

        killed = daemon.workers()[0]
        os.kill(killed, signal.SIGKILL)
        daemon.wait_for_workers(2, without=killed)
        assert daemon.counters()["lines"] == 65


def test_idle_daemon_makes_no_system_call(tmp_path: Path) -> None:
    with Daemon() as daemon:
        client = daemon.connect()
        assert client.ask(b"hello") == b"HELLO"
        traced = [daemon.pid, *daemon.workers()]
        trace = tmp_path / "trace"
        with tracing(traced, trace):
            # Each stands in the call that it waits in; that call's beginning is traced.
            until(lambda: len(trace.read_text().splitlines()) == len(traced))
            standing = trace.read_text()
            sleep(10)  # this is what is measured, not a wait for something
            assert trace.read_text() == standing
            # To prove that more would have been seen:
            assert client.ask(b"hello") == b"HELLO"
            # With sendto(2) by the C module, with write(2) in Python.
            until(lambda: re.search(r"\b(sendto|write)\(", trace.read_text()))


@contextlib.contextmanager
def tracing(pids: list[int], output: Path) -> Iterator[None]:
    """A context in which the system calls of processes are written down (strace(1))."""
    command = ["strace", "-f", "-o", str(output), *(f"-p{pid}" for pid in pids)]
    need("strace")
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with tracer:
        assert tracer.stderr
        for _ in pids:
            said = tracer.stderr.readline()
            if "attached" not in said:
                tracer.wait()
                cannot(f"strace: {said}")
        try:
            yield
        finally:
            tracer.terminate()
