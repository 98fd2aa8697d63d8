"""The client as a process: what it sends and prints, where it finds a server, how it ends."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.client import OWN
from integration.tcpupper import (
    CLIENT,
    PIPE,
    ROOT,
    full_queue,
    nobody,
    read_from,
    run,
    serving,
    started,
    upper_all,
    write_to,
)
from waiting import DEADLINE

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


def test_each_line_is_answered_while_input_continues() -> None:
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
    with serving(upper_all, listener=listener) as server:
        assert run(*server, "hello").stdout == b"HELLO\n"


def test_abstract_unix_socket() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(OWN.replace("@", "\0"))
    listener.listen()
    with serving(upper_all, listener=listener) as server:
        assert run(*server, "hello").stdout == b"HELLO\n"


def test_every_address_of_a_name_is_tried() -> None:
    with serving(upper_all) as server:
        assert run("--host", "localhost", *server[2:], "hello").stdout == b"HELLO\n"


def test_verbose_shows_the_address_on_standard_error() -> None:
    with serving(upper_all) as server:
        done = run(*server, "-v", "hello")
    assert (done.returncode, done.stdout) == (0, b"HELLO\n")
    pattern = rf"tcpupper: connected to 127\.0\.0\.1:{server[3]} from 127\.0\.0\.1:[0-9]+\n"
    assert re.fullmatch(pattern, done.stderr.decode())


@pytest.mark.parametrize(("option", "host"), [("-4", "127.0.0.1"), ("-6", "::1")])
@pytest.mark.parametrize("use", [["hello"], ["--ping", "-c", "1"], ["--check"]])
def test_family(option: str, host: str, use: list[str]) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    with serving(upper_all, listener=listener) as server:
        done = run("-v", option, *server, *use)
    address = f"[{host}]:{server[3]}" if ":" in host else f"{host}:{server[3]}"
    assert f"connected to {address} from " in (done.stdout + done.stderr).decode()
    assert done.returncode == 0


@pytest.mark.parametrize(("option", "host"), [("-4", "::1"), ("-6", "127.0.0.1")])
def test_other_family_is_not_tried(option: str, host: str) -> None:
    done = run(option, "--host", host, "hello")
    assert done.returncode == 1
    assert done.stderr.startswith(b"tcpupper: cannot connect to ")
    assert b"Connection refused" not in done.stderr


@pytest.mark.parametrize("use", [["hello"], ["--ping", "-c", "1"], ["--check"]])
def test_connection_comes_from_the_address_given(use: list[str]) -> None:
    peers = []

    def note_peer(connection: socket.socket) -> None:
        peers.append(connection.getpeername()[0])
        upper_all(connection)

    with serving(note_peer) as server:
        assert run("--bind", "127.0.0.2", *server, *use).returncode == 0
    assert peers == ["127.0.0.2"]


@pytest.mark.parametrize(("use", "status"), [("hello", 1), ("--check", 3)])
def test_address_that_is_not_local(use: str, status: int) -> None:
    done = run("--bind", "192.0.2.9", "--host", "127.0.0.1", use)
    complaint = "127.0.0.1:9999: cannot bind to local address 192.0.2.9: Cannot assign requested"
    assert f"cannot connect to {complaint} address\n" in (done.stdout + done.stderr).decode()
    assert done.returncode == status


def test_refused_connection() -> None:
    with nobody() as server:
        done = run(*server, "hello")
    assert done.returncode == 1
    name = f"127.0.0.1:{server[3]}"
    assert done.stderr.decode() == f"tcpupper: cannot connect to {name}: Connection refused\n"


def test_full_queue_of_a_unix_socket_is_reported_immediately(tmp_path: Path) -> None:
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
    with full_queue() as server:
        done = run(*server, "--timeout", "0.2", "hello")
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
        ("<&-", "tcpupper: standard input is closed and no TEXT was given\n"),
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
