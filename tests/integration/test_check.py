"""`tcpupper --check` as a monitoring system runs it: the status, and the one line it reads."""

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from integration.daemon import Daemon
from integration.tcpupper import (
    CLIENT,
    PIPE,
    ROOT,
    Behaviour,
    closed_pipe,
    full,
    nobody,
    reset_at_close,
    run,
    run_behind_full_queue,
    serving,
    started,
    stay_silent,
)
from waiting import DEADLINE

OK, WARNING, CRITICAL, UNKNOWN = range(4)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, str]]:
    """The host and the port of a daemon."""
    with Daemon() as daemon:
        host, _, port = daemon.addresses[0].rpartition(":")
        yield host, port


@pytest.mark.parametrize(
    ("thresholds", "status", "name", "limits"),
    [
        ([], OK, "OK", ";"),
        (["-w", "20", "-c", "30"], OK, "OK", "20;30"),
        (["-w", "0.000001", "-c", "30"], WARNING, "WARNING", "1e-06;30"),
        (["-c", "0.000001"], CRITICAL, "CRITICAL", ";1e-06"),
    ],
)
def test_right_answer(
    address: tuple[str, str], thresholds: list[str], status: int, name: str, limits: str
) -> None:
    host, port = address
    done = run("--check", "-H", host, "-p", port, *thresholds)
    pattern = (
        rf"TCPUPPER {name}: {host}:{port} answered in ([0-9.]+) s"
        rf" \| time=\1s;{limits};0;10\n"
    )
    assert re.fullmatch(pattern, done.stdout.decode()), done.stdout
    assert (done.returncode, done.stderr) == (status, b"")


def test_verbose_shows_the_connection(address: tuple[str, str]) -> None:
    host, port = address
    done = run("--check", "-H", host, "-p", port, "-v")
    pattern = rb" s, connected to 127\.0\.0\.1:%b from 127\.0\.0\.1:[0-9]+ \| time="
    assert re.search(pattern % port.encode(), done.stdout)


def echo(connection: socket.socket) -> None:
    connection.sendall(connection.recv(1000))


def greet(connection: socket.socket) -> None:
    connection.sendall(b"220 mail.example.org ready\r\n")
    connection.recv(1000)


def answer_a_part(connection: socket.socket) -> None:
    connection.sendall(connection.recv(1000).upper()[:-1])


def close(connection: socket.socket) -> None:
    connection.recv(1000)


@pytest.mark.parametrize(
    ("behaviour", "complaint"),
    [
        (echo, r"wrong answer from {}: 'tcpupper [0-9a-f]+ check seq=1\\n'"),
        (greet, r"wrong answer from {}: '220 mail.example.org ready\\r\\n'"),
        (
            answer_a_part,
            "lost the connection to {}: the server closed the connection without answering",
        ),
        (close, "lost the connection to {}: the server closed the connection without answering"),
    ],
)
def test_server_that_does_not_answer_right(behaviour: Behaviour, complaint: str) -> None:
    with serving(behaviour) as server:
        done = run("--check", *server)
    name = re.escape(f"127.0.0.1:{server[3]}")
    pattern = f"TCPUPPER CRITICAL: {complaint.format(name)}\n"
    assert re.fullmatch(pattern, done.stdout.decode()), done.stdout
    assert done.returncode == CRITICAL


def test_right_answer_before_a_reset_is_ok() -> None:
    def answer_and_reset(connection: socket.socket) -> None:
        reset_at_close(connection)
        connection.sendall(connection.recv(1000).upper())

    for _ in range(10):  # the reset may be too late to be noticed
        with serving(answer_and_reset) as server:
            done = run("--check", *server, "-v")
        assert done.returncode == OK, done.stdout


def test_address_that_drops_packets_has_a_share_of_the_time() -> None:
    done = run_behind_full_queue("--check", "-t", "10")
    assert done.returncode == OK, done.stdout


def test_refused_connection() -> None:
    with nobody() as server:
        done = run("--check", *server)
    complaint = f"cannot connect to 127.0.0.1:{server[3]}: Connection refused"
    assert done.stdout.decode() == f"TCPUPPER CRITICAL: {complaint}\n"
    assert done.returncode == CRITICAL


def test_unknown_name() -> None:
    done = run("--check", "-H", "name.invalid")
    assert done.stdout.startswith(b"TCPUPPER CRITICAL: cannot connect to name.invalid:9999: ")
    assert done.returncode == CRITICAL


def test_silent_server() -> None:
    with serving(stay_silent) as server:
        done = run("--check", *server, "-t", "1")
    complaint = f"no answer from 127.0.0.1:{server[3]} for 1 s"
    assert done.stdout.decode() == f"TCPUPPER CRITICAL: {complaint}\n"
    assert done.returncode == CRITICAL


def test_invalid_command_line() -> None:
    done = run("--check", "--port", "http")
    assert done.stdout.startswith(b"TCPUPPER UNKNOWN: argument -p/--port: 'http' is not a port")
    assert (done.returncode, done.stderr) == (UNKNOWN, b"")


def test_interrupt_says_nothing_of_the_server() -> None:
    received = threading.Event()

    def receive(connection: socket.socket) -> None:
        connection.recv(1000)
        received.set()
        stay_silent(connection)

    with serving(receive) as server, started("--check", *server) as process:
        assert received.wait(DEADLINE)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, output) == (UNKNOWN, b"TCPUPPER UNKNOWN: interrupted\n")


@pytest.mark.parametrize("output", [closed_pipe, full])
@pytest.mark.parametrize("arguments", [["--port", "1"], ["--port", "http"]])
def test_output_that_cannot_be_written(output: Callable[[], int], arguments: list[str]) -> None:
    descriptor = output()
    done = run("--check", *arguments, stdout=descriptor)
    os.close(descriptor)
    assert done.returncode == UNKNOWN
    assert done.stderr.startswith(b"tcpupper: cannot write standard output: ")


def test_closed_output() -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", *CLIENT, "--check"]
    done = subprocess.run(command, cwd=ROOT, stderr=PIPE, check=False)
    assert (done.returncode, done.stderr) == (UNKNOWN, b"tcpupper: standard output is closed\n")
