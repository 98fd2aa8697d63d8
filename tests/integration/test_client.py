"""The client as a process, against servers that behave, and servers that do not."""

import contextlib
import hashlib
import os
import re
import signal
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


@contextlib.contextmanager
def serving(behaviour: Behaviour, listener: socket.socket | None = None) -> Iterator[list[str]]:
    """Serve one connection by ``behaviour`` and close it; yield the client's options for it."""
    listener = listener or socket.create_server(("127.0.0.1", 0))
    listener.settimeout(DEADLINE)

    def serve() -> None:
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
    # Tests that a shell runs in the background inherit that SIGINT is ignored.
    command = ["env", "--default-signal=INT", *CLIENT, *arguments]
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


# What is sent and printed


def test_words_are_sent_as_one_line_and_the_answer_is_printed() -> None:
    received = []

    def record(connection: socket.socket) -> None:
        while data := connection.recv(100):
            received.append(data)
            connection.sendall(data.upper())

    with serving(record) as server:
        done = run(*server, "hello", "wide world")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"HELLO WIDE WORLD\n", b"")
    assert b"".join(received) == b"hello wide world\n"


def test_words_that_are_no_utf8_are_sent_as_they_are() -> None:
    with serving(upper_all) as server:
        done = run(*server, os.fsdecode(b"gr\xfc\xdfe \xc3\xa9"))
    assert (done.returncode, done.stdout) == (0, b"GR\xfc\xdfE \xc3\xa9\n")


def test_standard_input_is_not_read_when_there_is_text() -> None:
    with serving(upper_all) as server, started(*server, "hello") as process:
        assert process.wait(DEADLINE) == 0
        assert read_from(process, 100) == b"HELLO\n"


@pytest.mark.parametrize("data", [b"", b"\n", b"one\ntwo\n", b"no newline", b"\0\xff\r\n" * 3])
def test_filter(data: bytes) -> None:
    with serving(upper_all) as server:
        done = run(*server, stdin=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, data.upper(), b"")


def test_each_line_is_answered_while_input_goes_on() -> None:
    with serving(upper_all) as server, started(*server) as process:
        for word in (b"one", b"two", b"three"):
            write_to(process, word + b"\n")
            assert read_from(process, len(word) + 1) == word.upper() + b"\n"
        assert process.communicate(timeout=DEADLINE) == (b"", b"")
        assert process.returncode == 0


def test_answers_that_come_only_after_the_end_of_input_are_printed() -> None:
    def answer_late(connection: socket.socket) -> None:
        data = b"".join(iter(lambda: connection.recv(65536), b""))
        connection.sendall(data.upper())

    with serving(answer_late) as server:
        done = run(*server, stdin=b"line\n" * 100000)
    assert (done.returncode, done.stdout) == (0, b"LINE\n" * 100000)


def test_much_data_passes_both_ways_in_little_memory(tmp_path: Path) -> None:
    block = b"any text, as long as you like\n" * 35000
    blocks = 128
    source = tmp_path / "input"
    with source.open("wb") as file:
        for _ in range(blocks):
            file.write(block)
    digest = hashlib.sha256()
    peak = 0
    with (
        serving(upper_all) as server,
        source.open("rb") as stdin,
        subprocess.Popen([*CLIENT, *server], cwd=ROOT, stdin=stdin, stdout=PIPE) as process,
    ):
        assert process.stdout is not None
        while data := process.stdout.read(len(block)):
            digest.update(data)
            peak = peak_memory(process.pid) or peak
    assert process.returncode == 0
    assert digest.digest() == hashlib.sha256(block.upper() * blocks).digest()
    assert 0 < peak < len(block) * blocks / 2


def peak_memory(pid: int) -> int:
    """The most bytes of memory that a process has had; 0 if it has ended. (The ru_maxrss of a
    child counts from before exec(2), and so what its parent had.)"""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+([0-9]+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


# Where the server is


def test_unix_socket(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    with serving(upper_all, listener) as server:
        assert run(*server, "hello").stdout == b"HELLO\n"


def test_abstract_unix_socket() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0tcpupper-test-{os.getpid()}")
    listener.listen()
    with serving(upper_all, listener) as server:
        assert run(*server, "hello").stdout == b"HELLO\n"


def test_every_address_of_a_name_is_tried() -> None:
    with serving(upper_all) as server:
        assert run("--host", "localhost", *server[2:], "hello").stdout == b"HELLO\n"


def test_refused_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        server = options_for(unused)
    done = run(*server, "hello")
    assert done.returncode == 1
    name = f"127.0.0.1:{server[3]}"
    assert done.stderr.decode() == f"tcpupper: cannot connect to {name}: Connection refused\n"


def test_full_queue_of_a_unix_socket_is_reported_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        done = run("--unix", path, "hello")
    assert done.returncode == 1
    complaint = f"tcpupper: cannot connect to {path}: Resource temporarily unavailable\n"
    assert done.stderr.decode() == complaint


def test_unanswered_connection_attempt_is_given_up() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    with listener, contextlib.ExitStack() as waiting:
        for _ in range(2):  # a queue of 0 holds one; the kernel ignores attempts beyond it
            attempt = waiting.enter_context(socket.socket())
            attempt.setblocking(False)
            attempt.connect_ex(listener.getsockname())
        done = run(*options_for(listener), "--timeout", "0.2", "hello")
    assert done.returncode == 1
    assert done.stderr.endswith(b": timed out\n")


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        (["--host", "name.invalid"], "cannot connect to name.invalid:9999: "),
        (["--host", "two..dots"], "cannot connect to 'two..dots': not a host name"),
        (["--unix", "/nonexistent"], "cannot connect to /nonexistent: No such file or directory"),
        (["--unix", "/" + 108 * "x"], ": AF_UNIX path too long"),
    ],
)
def test_server_that_cannot_be_found(server: list[str], complaint: str) -> None:
    done = run(*server, "hello")
    assert done.returncode == 1
    assert done.stderr.startswith(b"tcpupper: ")
    assert complaint in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


# Servers that do not keep their word


def test_connection_closed_early_prints_what_came() -> None:
    def answer_half(connection: socket.socket) -> None:
        data = b"".join(iter(lambda: connection.recv(100), b""))
        connection.sendall(data.upper()[: len(data) // 2])

    with serving(answer_half) as server:
        done = run(*server, stdin=b"one\ntwo\n")
    assert (done.returncode, done.stdout) == (1, b"ONE\n")
    assert b" closed the connection early (4 bytes answered of 8)\n" in done.stderr


def test_connection_closed_while_input_goes_on() -> None:
    def answer_one_line(connection: socket.socket) -> None:
        connection.sendall(connection.recv(100).upper())

    with serving(answer_one_line) as server, started(*server) as process:
        write_to(process, b"one\n")
        assert process.wait(DEADLINE) == 1
        assert read_from(process, 100) == b"ONE\n"
        assert process.stderr is not None
        assert b" closed the connection early (4 bytes answered of 4)\n" in process.stderr.read()


def test_reset_connection_prints_what_came() -> None:
    def answer_and_reset(connection: socket.socket) -> None:
        connection.sendall(connection.recv(100).upper())
        assert connection.recv(100) == b"two\n"
        linger_not = struct.pack("ii", 1, 0)  # close(2) then sends RST in place of FIN
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)

    with serving(answer_and_reset) as server, started(*server) as process:
        write_to(process, b"one\n")
        assert read_from(process, 4) == b"ONE\n"
        write_to(process, b"two\n")
        assert process.wait(DEADLINE) == 1
        assert process.stderr is not None
        complaint = process.stderr.read()
    assert b"lost the connection to 127.0.0.1:" in complaint
    assert b": Connection reset by peer (4 bytes answered of 8)\n" in complaint


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
            connection.sendall(b"x")  # fails once the client is gone


@pytest.mark.parametrize("behaviour", [greet, greet_and_reset, greet_and_stay])
def test_server_that_says_more_than_it_was_asked(behaviour: Behaviour) -> None:
    with serving(behaviour) as server:
        done = run(*server, "hello")
    assert done.returncode == 1
    assert done.stdout.startswith(GREETING)
    assert b" is not a tcpupperd server: it sent " in done.stderr
    assert b" bytes in answer to 6; check the address\n" in done.stderr


def test_server_that_greets_is_not_waited_for() -> None:
    with serving(greet) as server, started(*server) as process:
        assert process.wait(DEADLINE) == 1  # though there is no end of input
        assert process.stderr is not None
        complaint = process.stderr.read()
    assert b" is not a tcpupperd server: it sent 28 bytes in answer to 0;" in complaint


def test_one_byte_is_not_bytes() -> None:
    def answer_one_byte(connection: socket.socket) -> None:
        connection.sendall(connection.recv(100)[:1].upper())

    with serving(answer_one_byte) as server:
        done = run(*server, stdin=b"one\n")
    assert b" closed the connection early (1 byte answered of 4)\n" in done.stderr


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
        done = run(*server, "--timeout", "0.3", stdin=stdin)
        left.set()
    assert done.returncode == 1
    assert b"tcpupper: no answer from 127.0.0.1:" in done.stderr
    assert b" for 0.3 s (0 bytes answered of " in done.stderr


def test_silent_server_is_given_up_though_input_goes_on() -> None:
    left = threading.Event()
    reading, writing = os.pipe()
    with serving(silence_until(left, reading=False)) as server:
        with subprocess.Popen(
            [*CLIENT, *server, "--timeout", "0.5"], cwd=ROOT, stdin=reading, stderr=PIPE
        ) as process:
            os.close(reading)
            with contextlib.suppress(BrokenPipeError):
                while process.poll() is None:  # a line now and then, never the end of input
                    os.write(writing, b"line\n")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.1)
            os.close(writing)
            assert process.wait(DEADLINE) == 1
        left.set()


def test_waiting_for_input_is_not_limited() -> None:
    with serving(upper_all) as server, started(*server, "--timeout", "0.2") as process:
        assert_still_running(process, 0.6)
        write_to(process, b"hello\n")
        assert read_from(process, 6) == b"HELLO\n"
        assert_still_running(process, 0.6)
        assert process.communicate(timeout=DEADLINE) == (b"", b"")
        assert process.returncode == 0


def test_unfinished_line_is_not_owed_an_answer() -> None:
    def answer_lines(connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            for line in lines:
                connection.sendall(line.upper())

    with serving(answer_lines) as server, started(*server, "--timeout", "0.2") as process:
        write_to(process, b"one\ntw")
        assert read_from(process, 4) == b"ONE\n"
        assert_still_running(process, 0.6)
        assert process.communicate(b"o", timeout=DEADLINE) == (b"TWO", b"")
        assert process.returncode == 0


@pytest.mark.parametrize("blocking", [True, False])
def test_waiting_for_the_reader_of_the_output_is_not_limited(blocking: bool) -> None:
    data = 4_000_000 * b"x" + b"\n"
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    with (
        serving(upper_all) as server,
        started(*server, "--timeout", "0.5", stdout=writing) as process,
    ):
        os.close(writing)
        feeder = threading.Thread(target=process.communicate, args=(data, DEADLINE))
        feeder.start()
        assert_still_running(process, 1.2)
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

    with serving(answer_when_told) as server, started(*server, "--timeout", "1") as process:
        write_to(process, b"hello\n")
        assert received.wait(DEADLINE)
        process.send_signal(signal.SIGSTOP)
        assert_still_running(process, 1.2)
        proceed.set()
        assert_still_running(process, 0.1)
        process.send_signal(signal.SIGCONT)
        assert read_from(process, 6) == b"HELLO\n"


# Ending


def test_closed_output_ends_the_client_quietly() -> None:
    with serving(upper_all) as server, started(*server) as process:
        write_to(process, b"one\n")
        assert read_from(process, 4) == b"ONE\n"
        assert process.stdout is not None
        process.stdout.close()
        write_to(process, b"two\n")
        assert process.wait(DEADLINE) == -signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_interrupt_ends_the_client_quietly() -> None:
    with serving(upper_all) as server, started(*server) as process:
        write_to(process, b"one\n")
        assert read_from(process, 4) == b"ONE\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == -signal.SIGINT  # 130 in a shell
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_full_disk() -> None:
    with serving(upper_all) as server, open("/dev/full", "wb") as full:
        done = run(*server, "hello", stdout=full.fileno())
    assert done.returncode == 1
    expected = "tcpupper: cannot write standard output: No space left on device\n"
    assert done.stderr.decode() == expected


def test_directory_as_input() -> None:
    """Python itself ends over it. The manual says with which words, and scripts can tell."""
    manual = (ROOT / "data/man/tcpupper.1").read_text()
    [told] = re.findall(r'^\.It "(Fatal Python error: .*)"$', manual, re.M)
    directory = os.open("/", os.O_RDONLY)
    done = subprocess.run(CLIENT, cwd=ROOT, stdin=directory, capture_output=True, check=False)
    os.close(directory)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().startswith(told)


def test_unreadable_input() -> None:
    writing_only = os.open("/dev/null", os.O_WRONLY)
    with serving(upper_all) as server:
        done = subprocess.run(
            [*CLIENT, *server], cwd=ROOT, stdin=writing_only, capture_output=True, check=False
        )
    os.close(writing_only)
    assert done.returncode == 1
    assert done.stderr == b"tcpupper: cannot read standard input: Bad file descriptor\n"


@pytest.mark.parametrize(
    ("redirection", "complaint"),
    [
        (">&-", "tcpupper: standard output is closed\n"),
        ("<&-", "tcpupper: standard input is closed, and there is no TEXT\n"),
    ],
)
def test_closed_standard_stream(redirection: str, complaint: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *CLIENT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, complaint)


def test_closed_input_does_not_matter_with_text() -> None:
    with serving(upper_all) as server:
        command = ["sh", "-c", '"$@" <&-', "sh", *CLIENT, *server, "hello"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"HELLO\n", b"")


# The whole of it


@contextlib.contextmanager
def tcpupperd(path: Path) -> Iterator[list[str]]:
    """Run the daemon at a Unix socket; yield the client's options for it."""
    command = [sys.executable, "-m", "tcpupperd", "--listen", str(path), "--workers", "2"]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        contextlib.ExitStack() as stack,
    ):
        ready.bind(f"{path}.ready")
        ready.settimeout(DEADLINE)
        environ = {**os.environ, "NOTIFY_SOCKET": f"{path}.ready"}
        process = stack.enter_context(
            subprocess.Popen(command, cwd=ROOT, env=environ, stderr=PIPE)
        )
        stack.callback(process.terminate)
        while b"READY=1" not in ready.recv(4096):
            pass
        yield ["--unix", str(path)]


def test_client_and_daemon(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20000 + b"no newline"
    with tcpupperd(tmp_path / "socket") as server:
        assert run(*server, "hello").stdout == b"HELLO\n"
        done = run(*server, stdin=data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data.upper()
