"""The client as a process, with servers that break their word, or say nothing."""

import contextlib
import os
import signal
import socket
import subprocess
import threading

import pytest

from integration.tcpupper import (
    CLIENT,
    PIPE,
    ROOT,
    Behaviour,
    assert_still_running,
    read_from,
    reset_at_close,
    run,
    serving,
    started,
    upper_all,
    write_to,
)
from waiting import DEADLINE

#: Seconds in which a busy machine does what must be done in time.
PATIENCE = 3

# Servers that do not keep their word


def test_connection_closed_early_prints_the_partial_answer() -> None:
    def answer_half(connection: socket.socket) -> None:
        data = b"".join(iter(lambda: connection.recv(100), b""))
        connection.sendall(data.upper()[: len(data) // 2])

    with serving(answer_half) as server:
        done = run(*server, stdin=b"one\ntwo\n")
    assert (done.returncode, done.stdout) == (1, b"ONE\n")
    assert b" closed the connection early (4 of 8 bytes answered)\n" in done.stderr


def test_connection_closed_while_input_continues() -> None:
    def answer_one_line(connection: socket.socket) -> None:
        connection.sendall(connection.recv(100).upper())

    with serving(answer_one_line) as server, started(*server) as process:
        write_to(process, b"one\n")
        assert process.wait(DEADLINE) == 1
        assert read_from(process, 100) == b"ONE\n"
        assert process.stderr is not None
        assert b" closed the connection early (4 of 4 bytes answered)\n" in process.stderr.read()


def test_reset_connection_prints_the_partial_answer() -> None:
    def answer_and_reset(connection: socket.socket) -> None:
        connection.sendall(connection.recv(100).upper())
        assert connection.recv(100) == b"two\n"
        reset_at_close(connection)

    with serving(answer_and_reset) as server, started(*server) as process:
        write_to(process, b"one\n")
        assert read_from(process, 4) == b"ONE\n"
        write_to(process, b"two\n")
        assert process.wait(DEADLINE) == 1
        assert process.stderr is not None
        complaint = process.stderr.read()
    assert b"lost the connection to 127.0.0.1:" in complaint
    assert b": Connection reset by peer (4 of 8 bytes answered)\n" in complaint


def test_reset_while_sending_still_prints_what_was_answered() -> None:
    def answer_and_leave(connection: socket.socket) -> None:
        connection.sendall(connection.recv(4).upper())
        assert connection.recv(1, socket.MSG_PEEK)  # closing with input unread is a reset

    with serving(answer_and_leave) as server:
        done = run(*server, stdin=b"one\n" + 10_000_000 * b"x")
    assert (done.returncode, done.stdout) == (1, b"ONE\n")
    assert b"lost the connection" in done.stderr


GREETING = b"220 mail.example.org ready\r\n"


def greet(connection: socket.socket) -> None:
    """Greet, and wait for the client to leave."""
    connection.sendall(GREETING)
    while connection.recv(100):
        pass


def greet_and_reset(connection: socket.socket) -> None:
    """Greet, and leave with the client's line unread, which is a reset."""
    connection.sendall(GREETING)
    assert connection.recv(1, socket.MSG_PEEK)


def greet_and_stay(connection: socket.socket) -> None:
    """Greet, and wait even after the client's end of input, until it has left."""
    greet(connection)
    with contextlib.suppress(ConnectionError, TimeoutError):
        while True:
            connection.sendall(b"x")  # fails once the client has exited


@pytest.mark.parametrize("behaviour", [greet, greet_and_reset, greet_and_stay])
def test_server_that_says_more_than_it_was_asked(behaviour: Behaviour) -> None:
    with serving(behaviour) as server:
        done = run(*server, "hello")
    assert done.returncode == 1
    assert done.stdout.startswith(GREETING)
    assert b" is not a tcpupperd server: it sent " in done.stderr
    assert b" bytes in response to 6; check the address\n" in done.stderr


def test_server_that_greets_is_not_waited_for() -> None:
    with serving(greet) as server, started(*server) as process:
        assert process.wait(DEADLINE) == 1  # though there is no end of input
        assert process.stderr is not None
        complaint = process.stderr.read()
    assert b" is not a tcpupperd server: it sent 28 bytes in response to 0;" in complaint


def test_one_byte_is_not_bytes() -> None:
    def answer_one_byte(connection: socket.socket) -> None:
        connection.sendall(connection.recv(100)[:1].upper())

    with serving(answer_one_byte) as server:
        done = run(*server, stdin=b"one\n")
    assert b" closed the connection early (1 of 4 bytes answered)\n" in done.stderr


# Time


def silence_until(left: threading.Event, *, reading: bool) -> Behaviour:
    """Return a server that answers nothing until ``left`` is set."""

    def stay_silent(connection: socket.socket) -> None:
        while reading and connection.recv(65536):
            pass
        assert left.wait(DEADLINE)

    return stay_silent


@pytest.mark.parametrize("reading", [True, False])
@pytest.mark.parametrize("stdin", [b"hello\n", b"hello", 10_000_000 * b"x"])
def test_silent_server_is_given_up(reading: bool, stdin: bytes) -> None:
    left = threading.Event()
    with serving(silence_until(left, reading=reading)) as server:
        done = run(*server, "--timeout", "1", stdin=stdin)
        left.set()
    assert done.returncode == 1
    assert b"tcpupper: no answer from 127.0.0.1:" in done.stderr
    assert b" for 1 s (0 of " in done.stderr


def test_silent_server_is_given_up_even_if_input_continues() -> None:
    left = threading.Event()
    reading, writing = os.pipe()
    with serving(silence_until(left, reading=False)) as server:
        with subprocess.Popen(
            [*CLIENT, *server, "--timeout", "1"], cwd=ROOT, stdin=reading, stderr=PIPE
        ) as process:
            os.close(reading)
            with contextlib.suppress(BrokenPipeError):
                while process.poll() is None:  # a line from time to time, never the end of input
                    os.write(writing, b"line\n")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.1)
            os.close(writing)
            assert process.wait(DEADLINE) == 1
        left.set()


def test_waiting_for_input_is_not_limited() -> None:
    with serving(upper_all) as server, started(*server, "--timeout", str(PATIENCE)) as process:
        assert_still_running(process, 1.2 * PATIENCE)
        write_to(process, b"hello\n")
        assert read_from(process, 6) == b"HELLO\n"
        assert_still_running(process, 1.2 * PATIENCE)
        assert process.communicate(timeout=DEADLINE) == (b"", b"")
        assert process.returncode == 0


def test_unfinished_line_is_not_owed_an_answer() -> None:
    def answer_lines(connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            for line in lines:
                connection.sendall(line.upper())

    with serving(answer_lines) as server, started(*server, "--timeout", str(PATIENCE)) as process:
        write_to(process, b"one\ntw")
        assert read_from(process, 4) == b"ONE\n"
        assert_still_running(process, 1.2 * PATIENCE)
        assert process.communicate(b"o", timeout=DEADLINE) == (b"TWO", b"")
        assert process.returncode == 0


@pytest.mark.parametrize("blocking", [True, False])
def test_waiting_for_the_reader_of_the_output_is_not_limited(blocking: bool) -> None:
    data = 4_000_000 * b"x" + b"\n"
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    with (
        serving(upper_all) as server,
        started(*server, "--timeout", str(PATIENCE), stdout=writing) as process,
    ):
        os.close(writing)
        feeder = threading.Thread(target=process.communicate, args=(data, DEADLINE))
        feeder.start()
        assert_still_running(process, 1.2 * PATIENCE)
        with open(reading, "rb") as answer:
            assert answer.read() == data.upper()
        feeder.join(DEADLINE)
        assert process.returncode == 0


def test_answer_that_came_while_the_client_was_stopped_is_in_time() -> None:
    received, proceed = threading.Event(), threading.Event()

    def answer_when_told(connection: socket.socket) -> None:
        data = connection.recv(100)
        received.set()
        assert proceed.wait(DEADLINE)
        connection.sendall(data.upper())

    with (
        serving(answer_when_told) as server,
        started(*server, "--timeout", str(PATIENCE)) as process,
    ):
        write_to(process, b"hello\n")
        assert received.wait(DEADLINE)
        process.send_signal(signal.SIGSTOP)
        assert_still_running(process, 1.2 * PATIENCE)
        proceed.set()
        assert_still_running(process, 0.1)
        process.send_signal(signal.SIGCONT)
        assert read_from(process, 6) == b"HELLO\n"
