"""The client as a process, and servers for it that behave as a test says."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from waiting import DEADLINE

ROOT = Path(__file__).parents[2]
CLIENT = [sys.executable, "-m", "tcpupperd.client"]
PIPE = subprocess.PIPE

Behaviour = Callable[[socket.socket], None]


def upper_all(connection: socket.socket) -> None:
    while data := connection.recv(262144):
        connection.sendall(data.upper())


def stay_silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def reset_at_close(connection: socket.socket) -> None:
    """Have close(2) send a reset in place of the end of the connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def closed_pipe() -> int:
    """A descriptor that cannot be written to, because nobody can read it."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full() -> int:
    """A descriptor of a file on a full disk."""
    return os.open("/dev/full", os.O_WRONLY)


@contextlib.contextmanager
def serving(*behaviours: Behaviour, listener: socket.socket | None = None) -> Iterator[list[str]]:
    """Serve as many connections, one after the other, and close each; yield the client's options
    for it."""
    listener = listener or socket.create_server(("127.0.0.1", 0))
    listener.settimeout(DEADLINE)

    def serve() -> None:
        for behaviour in behaviours:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(DEADLINE)
                with contextlib.suppress(ConnectionError):
                    behaviour(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield options_for(listener)
    finally:
        thread.join(DEADLINE)
        listener.close()
    assert not thread.is_alive()


@contextlib.contextmanager
def nobody(host: str = "127.0.0.1") -> Iterator[list[str]]:
    """A port at which nothing listens, nor can come to listen in another test; yield the client's
    options for it."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a daemon may listen there
        bound.bind((host, 0))
        yield options_for(bound)


@contextlib.contextmanager
def full_queue() -> Iterator[list[str]]:
    """A server that takes no connection; yield the client's options for it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with filled(listener):
            yield options_for(listener)


@contextlib.contextmanager
def filled(listener: socket.socket) -> Iterator[None]:
    """Listen, with a full queue: the kernel ignores further attempts to connect."""
    listener.listen(0)
    with contextlib.ExitStack() as waiting:
        for _ in range(2):  # a queue of 0 holds one
            attempt = waiting.enter_context(socket.socket(listener.family))
            attempt.setblocking(False)
            attempt.connect_ex(listener.getsockname())
        yield


#: The client, for which every name has the addresses 127.0.0.1 and 127.0.0.2.
TWO_ADDRESSES = """
import socket, sys
from tcpupperd.client.command import main
look_up = socket.getaddrinfo
socket.getaddrinfo = lambda host, *more: look_up("127.0.0.1", *more) + look_up("127.0.0.2", *more)
sys.exit(main())
"""


def run_behind_full_queue(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
    """Run the client for a name whose first address takes no connection."""
    with full_queue() as first:
        second = socket.create_server(("127.0.0.2", int(first[3])))
        with serving(upper_all, listener=second):
            command = [sys.executable, "-c", TWO_ADDRESSES, *arguments, "--port", first[3]]
            return subprocess.run(command, cwd=ROOT, capture_output=True, check=False)


def options_for(listener: socket.socket) -> list[str]:
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        name = address if isinstance(address, str) else "@" + address[1:].decode()
        return ["--unix", name]
    return ["--host", address[0], "--port", str(address[1])]


def run(
    *arguments: str, stdin: bytes = b"", stdout: int = PIPE
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [*CLIENT, *arguments],
        cwd=ROOT,
        input=stdin,
        stdout=stdout,
        stderr=PIPE,
        timeout=DEADLINE,
        check=False,
    )


@contextlib.contextmanager
def started(*arguments: str, stdout: int = PIPE) -> Iterator["subprocess.Popen[bytes]"]:
    command = [*CLIENT, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=PIPE, stdout=stdout, stderr=PIPE, bufsize=0
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def assert_still_running(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)


def write_to(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)


def read_from(process: "subprocess.Popen[bytes]", count: int) -> bytes:
    assert process.stdout is not None
    return process.stdout.read(count)
