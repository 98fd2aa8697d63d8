"""Measurements outside the rounds: memory, starting, spreading, replacing.

Each function returns rows of a table: what was measured, the value, and the project's aim.
"""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median

from benchmarks.build import PYTHON, TREE
from benchmarks.load import ONE_AT_A_TIME, measure
from benchmarks.processes import children, count_sockets, name, private_bytes, tree
from benchmarks.results import Row, spread
from benchmarks.servers import (
    CPUS,
    ENVIRONMENT,
    PROGRAM,
    SERVER_CPU,
    Running,
    Server,
    free_port,
    started,
    stop,
    tcpupperd,
)

ACTIVATE = "/usr/bin/systemd-socket-activate"


def daemon(workers: int) -> Server:
    return Server(f"tcpupperd, {workers} workers", tcpupperd("--workers", str(workers)))


def exchange(connection: socket.socket) -> None:
    """One line there and its answer back."""
    connection.sendall(b"hello\n")
    answer = connection.recv(6, socket.MSG_WAITALL)
    if answer != b"HELLO\n":
        raise RuntimeError(f"wrong answer {answer!r}")


@contextmanager
def idle_connections(running: Running, count: int) -> Iterator[None]:
    """``count`` connections that have each had one line answered, and stay open."""
    with ExitStack() as stack:
        for _ in range(count):
            exchange(stack.enter_context(running.connect()))
        yield


# ---- memory ----


def memory_of_a_connection(server: Server, count: int) -> float:
    """Private bytes of all its processes that one of ``count`` idle connections costs."""
    first = 10  # these make the server allocate what it allocates only once
    with started(server) as running, idle_connections(running, first):
        before = private_bytes(tree(running.pid))
        with idle_connections(running, count - first):
            return (private_bytes(tree(running.pid)) - before) / (count - first)


def base_memory() -> list[Row]:
    with started(daemon(1)) as running, idle_connections(running, 1):
        workers = _workers(running, 1)
        keepers = [one for one in children(running.pid) if one not in workers]
        supervisor, worker, keeper = (
            private_bytes(processes) / 2**20 for processes in ([running.pid], workers, keepers)
        )
    return [
        ("private memory of the supervisor", f"{supervisor:.1f} MiB", ""),
        ("private memory of a worker", f"{worker:.1f} MiB", "4 MiB over the supervisor's"),
        ("private memory of a keeper", f"{keeper:.1f} MiB", "1 MiB"),
    ]


# ---- starting ----


def starting(rounds: int) -> list[Row]:
    """Measured in turn with the bare interpreter, so that a ratio compares the same moment."""
    actions = (_run_bare_interpreter, _seconds_to_ready, _seconds_to_activated_answer)
    times = [[action() for action in actions] for _ in range(rounds)]
    bare, ready, activated = zip(*times, strict=True)
    return [
        ("`python3 -c pass`, from exec to exit", f"{median(bare) * 1e3:.1f} ms", ""),
        _times_bare("from exec to READY=1", ready, bare, "at most 4 times that"),
        _times_bare("socket activation, first packet to first answer", activated, bare, ""),
    ]


def _times_bare(title: str, times: Sequence[float], bare: Sequence[float], aim: str) -> Row:
    ratios = [time / base for time, base in zip(times, bare, strict=True)]
    return (title, f"{spread(ratios)} times that, {median(times) * 1e3:.1f} ms", aim)


def _run_bare_interpreter() -> float:
    began = time.perf_counter()
    subprocess.run([PYTHON, "-c", "pass"], check=True, env=ENVIRONMENT)
    return time.perf_counter() - began


def _seconds_to_ready() -> float:
    command = [argument.format(port=free_port()) for argument in daemon(1).command]
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications,
    ):
        path = f"{directory}/notify"
        notifications.bind(path)
        notifications.settimeout(10)
        began = time.perf_counter()
        with _child(command, ENVIRONMENT | {"NOTIFY_SOCKET": path}):
            while b"READY=1" not in notifications.recv(4096):
                pass
            return time.perf_counter() - began


def _seconds_to_activated_answer() -> float:
    port = free_port()
    command = [ACTIVATE, f"--listen=127.0.0.1:{port}"]
    command += [*PROGRAM, "--workers", "1"]
    with _child(command, ENVIRONMENT) as process:
        assert process.stderr
        process.stderr.readline()  # "Listening on ...": a connection now starts the daemon
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            exchange(connection)
            return time.perf_counter() - began


@contextmanager
def _child(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, cwd=TREE, env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        stop(process)


# ---- workers ----


def two_workers(seconds: float, rounds: int) -> list[Row]:
    """CPU time for a line must not grow with the second worker, if both share the server's CPU;
    the rate grows if each has its own. The second one has the load generator's where there are
    only two, and what the second worker brings is then what the load generator leaves."""
    shared = [_two_to_one(str(SERVER_CPU), seconds, "cpu_us") for _ in range(rounds)]
    own = [_two_to_one(f"{SERVER_CPU},{CPUS[1]}", seconds, "rate") for _ in range(rounds)]
    has_spare = len(CPUS) > 2
    generator = "a third for" if has_spare else "one of which is also that of"
    return [
        ("CPU for a line, two workers against one, on one CPU", spread(shared), "at most 1.1"),
        (
            f"rate, two workers on two CPUs ({generator} the load generator) against one on one",
            spread(own),
            "at least 1.8" if has_spare else "",
        ),
    ]


def _two_to_one(cpus: str, seconds: float, figure: str) -> float:
    with started(daemon(1)) as running:
        one = measure(running, ONE_AT_A_TIME, seconds)
    with started(daemon(2), cpus=cpus) as running:
        two = measure(running, ONE_AT_A_TIME, seconds)
    ratio: float = getattr(two, figure) / getattr(one, figure)
    return ratio


def spreading(workers: int, connections: int) -> list[Row]:
    with started(daemon(workers), cpus=",".join(map(str, CPUS))) as running:
        processes = _workers(running, workers)
        before = [count_sockets(pid) for pid in processes]
        with idle_connections(running, connections):
            after = [count_sockets(pid) for pid in processes]
    held = sorted(now - then for now, then in zip(after, before, strict=True))
    return [
        (
            f"{connections} connections over {workers} workers, busiest to idlest",
            f"{held[-1] / max(held[0], 1):.2f} ({', '.join(map(str, held))})",
            "at most 1.3",
        )
    ]


def replacing(rounds: int) -> list[Row]:
    """The replacement of a killed worker accepts the connections that waited in the queue."""
    times = []
    with started(daemon(1)) as running:
        for _ in range(rounds):
            with idle_connections(running, 1):  # makes sure that the worker exists and has served
                [worker] = _workers(running, 1)
            os.kill(worker, signal.SIGKILL)
            began = time.perf_counter()
            with idle_connections(running, 1):
                times.append((time.perf_counter() - began) * 1e3)
    return [("from kill -9 of the only worker to the next answer", f"{spread(times)} ms", "")]


def _workers(running: Running, count: int) -> list[int]:
    """Wait for the worker processes; the daemon listens before they exist."""
    deadline = time.monotonic() + 10
    while len(processes := _without_keepers(children(running.pid))) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{running.server.name}: {len(processes)} workers of {count}")
        time.sleep(0.01)
    return processes


def _without_keepers(processes: list[int]) -> list[int]:
    return [one for one in processes if name(one) != "tcpupperd-keep"]
