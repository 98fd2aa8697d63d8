"""The client at a terminal: editing of lines, and the progress of a long input."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.tcpupper import CLIENT, PIPE, serving, upper_all
from integration.terminal import Terminal
from waiting import DEADLINE, until

LONGER = 1.2  # seconds, more than those after which an input is long


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as terminal:
        yield terminal


# A conversation


def test_lines_are_answered_one_by_one(terminal: Terminal) -> None:
    with serving(upper_all) as server, terminal.running([*CLIENT, *server]) as process:
        terminal.shows("^> $")
        terminal.type("one\r")
        terminal.shows("^> one\nONE\n> $")
        terminal.type("gr\u00fcn\r")
        terminal.shows("> gr\u00fcn\nGR\u00fcN\n> $")
        terminal.type("\x04")
        assert process.wait(DEADLINE) == 0
    assert terminal.text.endswith("> \n")
    assert terminal.settings_now() == terminal.settings


def test_line_can_be_edited_and_called_back(terminal: Terminal) -> None:
    with serving(upper_all) as server, terminal.running([*CLIENT, *server]) as process:
        terminal.shows("> $")
        terminal.type("ello\x01h\r")  # Ctrl-A: to the beginning of the line
        terminal.shows("\nHELLO\n> $")
        terminal.type("\x10 again\r")  # Ctrl-P: the line before
        terminal.shows("\nHELLO AGAIN\n> $")
        terminal.type("\x04")
        assert process.wait(DEADLINE) == 0


def test_interrupt_leaves_the_terminal_as_it_was(terminal: Terminal) -> None:
    with serving(upper_all) as server, terminal.running([*CLIENT, *server]) as process:
        terminal.shows("> $")
        terminal.type("half a li\x03")
        assert process.wait(DEADLINE) == -signal.SIGINT
    assert terminal.settings_now() == terminal.settings
    assert "Traceback" not in terminal.text


def test_interrupt_while_keys_are_handled(terminal: Terminal) -> None:
    with serving(upper_all) as server, terminal.running([*CLIENT, *server]) as process:
        terminal.shows("> $")
        terminal.type("x" * 90 + "\x01\x05" * 2000)  # to the beginning and to the end
        terminal.shows("x")
        process.send_signal(signal.SIGINT)  # typed, it would discard the keys
        until(lambda: terminal.text and process.poll() is not None)
        assert process.wait() == -signal.SIGINT
    assert terminal.settings_now() == terminal.settings


def test_interrupt_while_the_server_is_silent(terminal: Terminal) -> None:
    received = threading.Event()

    def receive(connection: socket.socket) -> None:
        while connection.recv(100):
            received.set()

    with serving(receive) as server, terminal.running([*CLIENT, *server]) as process:
        terminal.shows("> $")
        terminal.type("hello\r")
        assert received.wait(DEADLINE)
        terminal.type("\x03")
        assert process.wait(DEADLINE) == -signal.SIGINT
    assert "Traceback" not in terminal.text


def test_end_of_the_connection_shows_after_the_next_line(terminal: Terminal) -> None:
    def answer_once(connection: socket.socket) -> None:
        connection.sendall(connection.recv(100).upper())

    with serving(answer_once) as server, terminal.running([*CLIENT, *server]) as process:
        terminal.shows("> $")
        terminal.type("one\r")
        terminal.shows("\nONE\n> $")
        terminal.type("two\r")
        assert process.wait(DEADLINE) == 1
    assert "(4 of 8 bytes answered)\n" in terminal.text


def test_silent_server_is_given_up(terminal: Terminal) -> None:
    def read_on(connection: socket.socket) -> None:
        while connection.recv(100):
            pass

    arguments = ["--timeout", "1"]
    with serving(read_on) as server, terminal.running([*CLIENT, *server, *arguments]) as process:
        terminal.shows("> $")
        terminal.type("one\r")
        assert process.wait(DEADLINE) == 1
    assert " for 1 s (0 of 4 bytes answered)\n" in terminal.text


def test_answers_that_go_elsewhere_are_not_mixed_with_a_prompt(terminal: Terminal) -> None:
    with (
        serving(upper_all) as server,
        terminal.running([*CLIENT, *server], stdout=PIPE) as process,
    ):
        terminal.type("one\r\x04")
        output, _ = process.communicate(timeout=DEADLINE)
        assert (process.returncode, output) == (0, b"ONE\n")
    assert terminal.text == "one\n"  # the echo of the terminal itself


# Progress


def long_input(path: Path) -> int:
    path.write_bytes(b"line\n" * 200_000)
    return os.open(path, os.O_RDONLY)


def test_progress_of_a_long_input(terminal: Terminal, tmp_path: Path) -> None:
    seen = threading.Event()

    def answer_slowly(connection: socket.socket) -> None:
        while not seen.wait(0.02):
            connection.sendall(connection.recv(100).upper())
        upper_all(connection)

    source = long_input(tmp_path / "input")
    null = os.open(os.devnull, os.O_WRONLY)
    streams = {"stdin": source, "stdout": null}
    with (
        serving(answer_slowly) as server,
        terminal.running([*CLIENT, *server], **streams) as process,
    ):
        terminal.shows(r"\d+%.*/977k \[00:\d\d<.*B/s\]")  # share, size, times, rate
        seen.set()
        assert process.wait(DEADLINE) == 0
    os.close(source)
    os.close(null)
    assert "100%" in terminal.text


def test_progress_of_an_input_of_unknown_size(terminal: Terminal) -> None:
    seen = threading.Event()

    def answer_slowly(connection: socket.socket) -> None:
        while not seen.wait(0.02):
            connection.sendall(connection.recv(100).upper())
        upper_all(connection)

    reading, writing = os.pipe()
    null = os.open(os.devnull, os.O_WRONLY)
    streams = {"stdin": reading, "stdout": null}
    with (
        serving(answer_slowly) as server,
        terminal.running([*CLIENT, *server], **streams) as process,
    ):
        os.close(reading)
        os.write(writing, b"line\n" * 12_000)
        terminal.shows(r"\d+(\.\d+)?k?B \[00:\d\d, .*B/s\]")
        seen.set()
        os.close(writing)
        assert process.wait(DEADLINE) == 0
    os.close(null)


def answer_after_a_while(connection: socket.socket) -> None:
    """Answer something, and something more when the input has become a long one."""
    connection.sendall(connection.recv(100).upper())
    time.sleep(LONGER)  # the server's own pace
    upper_all(connection)


def test_no_progress_without_tqdm(terminal: Terminal, tmp_path: Path) -> None:
    source = long_input(tmp_path / "input")
    command = [sys.executable, "-S", *CLIENT[1:]]  # without any installed packages
    with (
        serving(answer_after_a_while) as server,
        terminal.running([*command, *server], stdin=source, stdout=PIPE) as process,
    ):
        output, _ = process.communicate(timeout=DEADLINE)
    os.close(source)
    assert (process.returncode, len(output)) == (0, 1_000_000)
    assert terminal.text == ""


@pytest.mark.parametrize("streams", [{"stderr": PIPE, "stdout": PIPE}, {}])
def test_no_progress_bar_without_a_terminal_or_among_answers(
    terminal: Terminal, tmp_path: Path, streams: dict[str, int]
) -> None:
    source = long_input(tmp_path / "input")
    with (
        serving(answer_after_a_while) as server,
        terminal.running([*CLIENT, *server], stdin=source, **streams) as process,
    ):
        if streams:
            _, errors = process.communicate(timeout=DEADLINE)
            assert errors == b""
        else:
            terminal.shows("LINE\n" * 200)
    os.close(source)
    assert "B/s" not in terminal.text
