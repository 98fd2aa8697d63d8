"""The client of a daemon that greets, for which it must be told."""

import re
import socket
from collections.abc import Iterator

import pytest

from integration.daemon import Daemon
from integration.tcpupper import run, serving


@pytest.fixture(scope="module")
def server() -> Iterator[list[str]]:
    with Daemon(greeting="one of {host} serves you") as daemon:
        host, _, port = daemon.addresses[0].rpartition(":")
        yield ["--host", host, "--port", port]


GREETING = f"greeting: one of {socket.gethostname()} serves you"


def test_greeting_is_no_part_of_the_answer(server: list[str]) -> None:
    done = run(*server, "--greeting", "hello")
    assert (done.returncode, done.stdout) == (0, b"HELLO\n")
    assert done.stderr.decode() == f"tcpupper: {GREETING}\n"


def test_ping_shows_the_greeting_of_each_connection(server: list[str]) -> None:
    done = run("--ping", *server, "--greeting", "--connections", "2", "-c", "2", "-i", "0.02")
    for number in (1, 2):
        assert f"connection={number} {GREETING}\n" in done.stdout.decode()
    assert "4 sent, 4 answered, 0 lost (0 %), 0 wrong," in done.stdout.decode()
    assert done.returncode == 0


def test_check_passes_over_the_greeting(server: list[str]) -> None:
    done = run("--check", *server, "--greeting")
    assert re.match(rb"TCPUPPER OK: .* answered in ", done.stdout)
    assert done.returncode == 0


@pytest.mark.parametrize("use", [["hello"], ["--ping", "-c", "1"], ["--check"]])
def test_greeting_that_is_not_expected_is_wrong(server: list[str], use: list[str]) -> None:
    assert run(*server, *use).returncode in (1, 2)


def test_greeting_that_does_not_come() -> None:
    def close(connection: socket.socket) -> None:
        connection.sendall(b"half a greeting")

    with serving(close) as server:
        done = run(*server, "--greeting", "hello")
    assert done.returncode == 1
    assert done.stderr.endswith(b" closed the connection without a greeting\n")
