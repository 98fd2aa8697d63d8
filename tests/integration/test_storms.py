"""Deaths, reloads and signals in close succession, while clients talk."""

import contextlib
import os
import random
import signal
import time

import pytest

from integration.daemon import Daemon
from integration.measures import anonymous_kib, scaled
from integration.processes import descriptors
from integration.talkers import Talkers
from waiting import until

TALKERS = 4

#: What a process may be found to have grown by, as its allocator has it.
SOME_KIB = 512

GOOD = ['log_level = "info"\n', "max_line = 1000\n", "idle_timeout = 99\n"]
BAD = ["workers = 'many'\n", "max_line = [\n", "no_such_setting = 1\n", "\0", "max_line = -1\n"]

#: What is sent to a supervisor and its workers. Stopped ones continue after a moment.
SIGNALS = [
    *(signal.SIGSTOP, signal.SIGCONT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD),
    *(signal.SIGPIPE, signal.SIGWINCH, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF),
    *(signal.SIGURG, signal.SIGIO, signal.SIGXCPU, signal.SIGXFSZ, signal.SIGPWR),
    *(signal.SIGQUIT, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)),
]


def test_workers_killed_one_after_another() -> None:
    """No connection is refused, ends or is answered wrongly; nothing is left of the dead."""
    deaths = scaled(15, 300)
    with Daemon(workers=2) as daemon, Talkers(daemon.addresses[0], TALKERS) as talkers:
        for number in range(deaths):
            began = time.monotonic()
            victim = random.choice(daemon.workers())
            os.kill(victim, signal.SIGKILL)
            daemon.wait_for_workers(2, without=victim)
            if number == deaths // 3:
                before = len(descriptors(daemon.pid)), anonymous_kib(daemon.pid)
            # The pace of deaths, which is part of the test: one each 100 ms.
            time.sleep(max(0.0, began + 0.1 - time.monotonic()))
        until(lambda: talkers.answers > deaths)
        talkers.stop()
        print(f"{talkers.answers} answers, longest wait {talkers.longest:.3f} s")
        assert not talkers.failures
        until(lambda: daemon.counters()["open"] == 0)
        until(lambda: len(descriptors(daemon.pid)) <= before[0])
        assert anonymous_kib(daemon.pid) <= before[1] + SOME_KIB


@pytest.mark.usefixtures("many_in_flight")
def test_killed_worker_is_replaced_immediately() -> None:
    """Without a pause, however many have died before: all have served a client."""
    deaths = scaled(20, 300)
    with Daemon(workers=1) as daemon:
        for _ in range(deaths):
            assert daemon.connect().ask(b"hello") == b"HELLO"
            (worker,) = daemon.workers()
            os.kill(worker, signal.SIGKILL)
            daemon.wait_for_workers(1, without=worker)
            assert daemon.connect().ask(b"hello") == b"HELLO"
        assert daemon.log.count(" left to its keeper, starting a replacement\n") == deaths
        assert "before it had served" not in daemon.log


def test_reloads_one_after_another() -> None:
    """Of good files and bad ones in turn: the last good one counts, and no answer is lost."""
    chance = random.Random(1)
    with Daemon(workers=2) as daemon, Talkers(daemon.addresses[0], TALKERS) as talkers:
        before = len(descriptors(daemon.pid)), anonymous_kib(daemon.pid)
        for number in range(scaled(40, 500)):
            daemon.configure(chance.choice((GOOD, BAD)[number % 2]))
            daemon.send_signal(signal.SIGHUP)
            # The next signal comes in the midst of a reload, right after it, or later.
            time.sleep(chance.choice((0, 0.01, 0.05)))
        daemon.configure("lines_per_connection = 30\n")
        daemon.send_signal(signal.SIGHUP)
        until(lambda: answers_to(daemon, b"line\n" * 40) == b"LINE\n" * 30)
        talkers.stop()
        print(f"{talkers.answers} answers, longest wait {talkers.longest:.3f} s")
        assert talkers.answers
        assert not talkers.failures

        daemon.wait_for_workers(2)
        # The start and each reload, good or bad, is answered.
        until(lambda: daemon.manager.count("READY=1") == 1 + daemon.manager.count("RELOADING=1"))
        until(lambda: len(descriptors(daemon.pid)) <= before[0])
        assert anonymous_kib(daemon.pid) <= before[1] + SOME_KIB


def answers_to(daemon: Daemon, data: bytes) -> bytes:
    client = daemon.connect()
    client.send(data)
    client.end()
    answers = client.read_to_end()
    client.close()
    return answers


def test_random_signals() -> None:
    """No zombie, no lost worker, no unrequested exit; the service continues."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with Daemon(workers=2, wrapper=("env", "WATCHDOG_USEC=20000000")) as daemon:
        with Talkers(daemon.addresses[0], TALKERS) as talkers:
            for _ in range(scaled(1000, 10_000)):
                target = chance.choice([daemon.pid, *daemon.workers()])
                number = chance.choice(SIGNALS)
                with contextlib.suppress(ProcessLookupError):  # a reload has just replaced it
                    os.kill(target, number)
                    if number == signal.SIGSTOP:
                        time.sleep(chance.random() / 20)  # the time for which it is stopped
                        os.kill(target, signal.SIGCONT)
            talkers.stop()
        print(f"{talkers.answers} answers, longest wait {talkers.longest:.3f} s")
        assert talkers.answers
        assert not talkers.failures
        daemon.wait_for_workers(2)
        until(lambda: not daemon.zombies())
        assert "killing" not in daemon.log
        assert daemon.connect().ask(b"hello") == b"HELLO"


def test_worker_killed_by_a_signal_without_a_name() -> None:
    """The C library keeps some for itself, which cannot be blocked and which Python has not."""
    with Daemon(workers=1) as daemon:
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGRTMIN - 1)
        daemon.wait_for_workers(1, without=worker)
        assert daemon.connect().ask(b"hello") == b"HELLO"
        assert f"worker {worker} was killed by signal 33" in daemon.log
