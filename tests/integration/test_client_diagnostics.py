"""The manual quotes the messages that the client prints."""

import re
import resource
import socket
import subprocess
import threading
from collections.abc import Callable

import pytest

from integration.tcpupper import (
    CLIENT,
    ROOT,
    Behaviour,
    full_queue,
    nobody,
    reset_at_close,
    run,
    serving,
    started,
    write_to,
)
from waiting import DEADLINE

MANUAL = (ROOT / "data/man/tcpupper.1").read_text().partition(".Sh DIAGNOSTICS\n")[2]
QUOTED = re.findall(r'^\.It "(.*)"$', MANUAL, re.MULTILINE)

#: Those that other tests provoke, or that depend on the resolver of this machine.
ELSEWHERE = ("Name or service not known", "Resource temporarily unavailable", "Fatal Python error")


def pattern(quoted: str) -> str:
    """A quoted message with any host, address and number; "..." stands for anything."""
    text = re.sub("[0-9]+", r"[\\d.]+", re.escape(quoted))
    return text.replace(r"\.\.\.", ".*").replace("localhost", r"\S+")


def talking_to(behaviour: Behaviour) -> str:
    with serving(behaviour) as server:
        return run(*server, "hello").stderr.decode()


def refused() -> str:
    with nobody() as server:
        return run(*server, "hello").stderr.decode()


def foreign_address() -> str:
    return run("--bind", "192.0.2.9", "--host", "127.0.0.1", "hello").stderr.decode()


def timed_out() -> str:
    with full_queue() as server:
        return run(*server, "--timeout", "0.2", "hello").stderr.decode()


def silent() -> str:
    left = threading.Event()

    def stay_silent(connection: socket.socket) -> None:
        connection.recv(100)
        left.wait()

    with serving(stay_silent) as server:
        done = run(*server, "--timeout", "1", "hello")
        left.set()
    return done.stderr.decode()


def closed_early() -> str:
    return talking_to(lambda connection: connection.sendall(connection.recv(100)[:2].upper()))


def reset() -> str:
    """Between two lines: the client is waiting for an answer, and has not closed its side."""

    def receive_and_reset(connection: socket.socket) -> None:
        assert connection.recv(100) == b"one\n"
        reset_at_close(connection)

    with serving(receive_and_reset) as server, started(*server) as process:
        write_to(process, b"one\n")
        process.wait(DEADLINE)
        assert process.stderr is not None
        return process.stderr.read().decode()


def too_few_descriptors() -> str:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    command = [*CLIENT, "--ping", "--connections", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, preexec_fn=limit)
    return done.stderr.decode()


def greeted() -> str:
    return talking_to(lambda connection: connection.sendall(b"220 mail.example.org ESMTP\r\n"))


def port_in_host() -> str:
    return run("--host", "localhost:9999", "hello").stderr.decode()


#: In the order of the manual.
SITUATIONS = [
    refused,
    foreign_address,
    timed_out,
    silent,
    closed_early,
    reset,
    too_few_descriptors,
    greeted,
    port_in_host,
]
MESSAGES = [one for one in QUOTED if not any(text in one for text in ELSEWHERE)]


@pytest.mark.parametrize(
    ("quoted", "provoke"),
    list(zip(MESSAGES, SITUATIONS, strict=True)),
    ids=[situation.__name__ for situation in SITUATIONS],
)
def test_message_is_the_quoted_one(quoted: str, provoke: Callable[[], str]) -> None:
    assert re.search(rf": {pattern(quoted)}$", provoke(), re.MULTILINE)
