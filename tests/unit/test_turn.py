"""A turn, in Python and in C: one contract, and what only the C one could do wrong."""

import contextlib
import faulthandler
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from array import array
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from typing import NoReturn

import pytest

from fuzz import turns
from fuzz.turns import RESET_AT_CLOSE, Turn, c_turn, tcp_pair
from integration.measures import scaled
from integration.processes import cannot
from tcpupperd.serving.turn import RECEIVE_SIZE, SWITCH, python_turn
from tools import need

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tcpupperd/serving/_turn.c"
COMPILE = ("-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
FUZZ_CASES = scaled(10_000, 1_000_000)
TURNS = scaled(100_000, 1_000_000)
DEADLINE = 30.0

Pair = tuple[socket.socket, socket.socket]


def compiled(target: Path, *options: str, compiler: str = "cc") -> str:
    """What the compiler says when it has made `target` of the C module, or else a skip."""
    include = sysconfig.get_path("include")
    if "t" in sys.abiflags:
        cannot("free-threaded Python has no stable ABI")
    if not Path(include, "Python.h").exists():
        cannot("Python's headers are not installed (apt-get install python3-dev)")
    command = (need(compiler), *COMPILE, *options, f"-I{include}", "-o", str(target), str(SOURCE))
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def c_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C module as it is in the tree, whatever is installed."""
    target = tmp_path_factory.mktemp("turn") / "_turn.abi3.so"
    compiled(target)
    return target


@pytest.fixture(params=["python", "c"])
def turn(request: pytest.FixtureRequest) -> Turn:
    """Either implementation."""
    if request.param == "python":
        return python_turn
    return c_turn(request.getfixturevalue("c_module"))


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A client, and the server's side of its connection."""
    client, server = socket.socketpair() if request.param == "unix" else tcp_pair()
    with client, server:
        server.setblocking(False)
        client.settimeout(DEADLINE)
        yield client, server


@pytest.fixture
def counts() -> "array[int]":
    return array("Q", [0, 0])


def sent(pair: Pair, data: bytes) -> int:
    """The server's descriptor once all that the client sends has arrived."""
    client, server = pair
    client.sendall(data)
    server.settimeout(DEADLINE)
    while len(server.recv(len(data), socket.MSG_PEEK | socket.MSG_WAITALL)) < len(data):
        pass
    server.setblocking(False)
    return server.fileno()


def received(client: socket.socket, size: int) -> bytes:
    return client.recv(size, socket.MSG_WAITALL)


def filled(server: socket.socket) -> int:
    """Send until the kernel takes no more; how much it has taken."""
    taken = 0
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                taken += server.send(bytes(size))
    return taken


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"\n", 1),
        (b"hello\n", 1),
        (b"MiXeD 123 [{`@\r\n", 1),
        (bytes(set(range(256)) - {10}) + b"\n", 1),
        ("grüße, \u0131, \u017f\n".encode(), 1),
        (b"one\ntwo\n\nfour\n", 4),
        (b"\n" * 1000, 1000),
        (b"x" * 999 + b"\n", 1),
    ],
)
def test_whole_lines_are_answered(
    turn: Turn, pair: Pair, counts: "array[int]", data: bytes, lines: int
) -> None:
    for number in (1, 2):
        assert turn(sent(pair, data), counts) is None
        assert received(pair[0], len(data)) == data.upper()
        assert list(counts) == [number * lines, number * len(data)]


@pytest.mark.parametrize("data", [b"h", b"hello", b"one\ntwo", b"\n\0"])
def test_data_other_than_complete_lines_is_handed_back(
    turn: Turn, pair: Pair, counts: "array[int]", data: bytes
) -> None:
    assert turn(sent(pair, data), counts) == (False, data)
    assert list(counts) == [0, 0]
    pair[1].close()
    assert pair[0].recv(1) == b""


def test_end_of_file_is_handed_back(turn: Turn, pair: Pair, counts: "array[int]") -> None:
    fd = sent(pair, b"last\n")
    pair[0].shutdown(socket.SHUT_WR)
    assert turn(fd, counts) is None
    assert turn(fd, counts) == (False, b"")


def test_no_more_than_its_size_is_received(turn: Turn, counts: "array[int]") -> None:
    client, server = socket.socketpair()
    with client, server:
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            client.setsockopt(socket.SOL_SOCKET, buffer, 4 * RECEIVE_SIZE)
            server.setsockopt(socket.SOL_SOCKET, buffer, 4 * RECEIVE_SIZE)
        fd = sent((client, server), b"y" * (RECEIVE_SIZE - 1) + b"\n" + b"next\n")
        assert turn(fd, counts) is None
        assert list(counts) == [1, RECEIVE_SIZE]
        assert turn(fd, counts) is None
        assert list(counts) == [2, RECEIVE_SIZE + 5]


def test_part_that_the_kernel_does_not_take_is_handed_back(
    turn: Turn, counts: "array[int]"
) -> None:
    client, server = socket.socketpair()
    with client, server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        data = b"abcdefghi\n" * 6000
        left, rest = turn(sent((client, server), data), counts) or (False, b"")
        assert left
        assert 0 < len(rest) < len(data)
        assert list(counts) == [6000, len(data) - len(rest)]
        assert received(client, counts[1]) + rest == data.upper()


def test_answer_is_handed_back_where_the_kernel_takes_nothing(
    turn: Turn, pair: Pair, counts: "array[int]"
) -> None:
    fd = sent(pair, b"hello\n")
    filled(pair[1])
    assert turn(fd, counts) == (True, b"HELLO\n")
    assert list(counts) == [1, 0]


def test_nothing_to_receive(turn: Turn, pair: Pair, counts: "array[int]") -> None:
    with pytest.raises(BlockingIOError):
        turn(pair[1].fileno(), counts)
    assert list(counts) == [0, 0]


def test_connection_that_was_reset(turn: Turn, counts: "array[int]") -> None:
    client, server = tcp_pair()
    with client, server:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        client.close()
        with pytest.raises(ConnectionResetError):
            turn(server.fileno(), counts)


def test_client_that_disconnects_before_its_answer(turn: Turn, counts: "array[int]") -> None:
    client, server = socket.socketpair()
    with client, server:
        fd = sent((client, server), b"hello\n")
        client.close()
        with pytest.raises(BrokenPipeError):
            turn(fd, counts)
        assert list(counts) == [1, 0]


def test_descriptor_other_than_a_socket(turn: Turn, counts: "array[int]") -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        turn(-1, counts)
    with pytest.raises(TypeError):
        turn("1", counts)  # type: ignore[arg-type]


def test_counts_may_be_a_part_of_a_shared_mapping(turn: Turn, pair: Pair) -> None:
    with mmap(-1, 4096) as mapping, memoryview(mapping) as bytewise, bytewise.cast("Q") as all_:
        all_[5:9] = memoryview(array("Q", [5, 2**32 - 1, 2**63, 8]))
        with all_[6:8] as counts:
            assert turn(sent(pair, b"one\ntwo\n"), counts) is None
        assert list(all_[5:9]) == [5, 2**32 + 1, 2**63 + 8, 8]


@pytest.mark.parametrize("counts", [array("Q", [0]), array("I", [0] * 4), bytes(16), None])
def test_counts_of_another_kind_are_refused(c_module: Path, pair: Pair, counts: object) -> None:
    fd = sent(pair, b"hello\n")
    with pytest.raises((ValueError, TypeError, BufferError)):
        c_turn(c_module)(fd, counts)
    assert pair[1].recv(100) == b"hello\n"


def test_interrupted_receiving_continues(turn: Turn, counts: "array[int]") -> None:
    client, server = socket.socketpair()
    with client, server, alarm_handler(lambda *_: client.sendall(b"hello\n")):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert turn(server.fileno(), counts) is None  # blocking, for once
        assert client.recv(100) == b"HELLO\n"


def test_signal_handler_may_raise(turn: Turn, counts: "array[int]") -> None:
    def handler(*_: object) -> NoReturn:
        raise ZeroDivisionError

    def interrupted() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        turn(server.fileno(), counts)

    client, server = socket.socketpair()
    with client, server, alarm_handler(handler):
        with pytest.raises(ZeroDivisionError):  # it may come before the turn on a busy machine
            interrupted()
        assert list(counts) == [0, 0]


class alarm_handler:  # noqa: N801
    """Calls a function when SIGALRM comes."""

    def __init__(self, handler: Callable[..., object]) -> None:
        self._handler = handler

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGALRM, self._handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGALRM, self._before)


def test_c_causes_no_sigpipe(c_module: Path, counts: "array[int]") -> None:
    client, server = socket.socketpair()
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        with client, server:
            fd = sent((client, server), b"hello\n")
            client.close()
            with pytest.raises(BrokenPipeError):
                c_turn(c_module)(fd, counts)
        assert signal.SIGPIPE not in signal.sigpending()
    finally:
        signal.signal(signal.SIGPIPE, before)  # which forgets one that is pending
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})


def test_threads_do_not_meet(turn: Turn) -> None:
    """One waits in the midst of its answer while another takes a turn."""
    # A thread that keeps the interpreter while it waits would stop this one, too.
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    client, server = socket.socketpair()
    with client, server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        data = (b"a" * 99 + b"\n") * 600
        fd = sent((client, server), data)
        server.setblocking(True)
        thread = threading.Thread(target=turn, args=(fd, array("Q", [0, 0])), daemon=True)
        thread.start()
        answer = client.recv(100, socket.MSG_WAITALL)
        other, its_server = socket.socketpair()
        with other, its_server:
            assert (
                turn(sent((other, its_server), b"b" * 60_000 + b"\n"), array("Q", [0, 0])) is None
            )
        answer += received(client, len(data) - 100)
        thread.join(DEADLINE)
    faulthandler.cancel_dump_traceback_later()
    assert answer == data.upper()


def test_fuzz(c_module: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    turns.fuzz(c_turn(c_module), FUZZ_CASES, seed)


def test_fuzz_under_sanitizers(tmp_path: Path) -> None:
    """No byte is read or written that is not the module's, and nothing is undefined."""
    target = tmp_path / "_turn.abi3.so"
    sanitize = "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"
    command: tuple[str, ...] = (need("gcc"), "-print-file-name=libasan.so")
    runtime = subprocess.check_output(command, text=True).strip()
    if not Path(runtime).is_absolute():
        cannot("gcc has no libasan")
    compiled(target, *sanitize, compiler="gcc")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # those of the interpreter are not the module's
    }
    command = (sys.executable, "-m", "fuzz.turns", str(target), str(FUZZ_CASES))
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def resident() -> int:
    """Bytes of memory that this process has at present."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def every_outcome(turn: Turn, pairs: dict[str, Pair], counts: "array[int] | memoryview") -> None:
    """Five turns, each with another outcome."""
    client, server = pairs["free"]
    data = b"x" * 999 + b"\n"
    client.send(data)
    assert turn(server.fileno(), counts) is None
    client.recv(1000)
    client.send(data[:-1])
    assert turn(server.fileno(), counts) == (False, data[:-1])
    with contextlib.suppress(BlockingIOError):
        turn(server.fileno(), counts)
    assert turn(pairs["ended"][1].fileno(), counts) == (False, b"")
    client, server = pairs["full"]
    client.send(data)
    assert turn(server.fileno(), counts) == (True, data.upper())


def test_nothing_leaks(turn: Turn) -> None:
    """Not an object, not a reference, not a buffer that is held: of each there would be one for
    every turn, against a bound of one for ten."""
    pairs = {name: socket.socketpair() for name in ("free", "ended", "full")}
    for _, server in pairs.values():
        server.setblocking(False)
    pairs["ended"][0].close()
    filled(pairs["full"][1])
    counts = memoryview(bytearray(16)).cast("Q")
    held = (counts, None, True, False, BlockingIOError)
    every_outcome(turn, pairs, counts)
    before = [sys.getallocatedblocks(), *map(sys.getrefcount, held)]
    memory = resident()
    for _ in range(TURNS // 5):
        every_outcome(turn, pairs, counts)
    after = [sys.getallocatedblocks(), *map(sys.getrefcount, held)]
    assert max(now - was for now, was in zip(after, before, strict=True)) < TURNS // 50
    # Objects of more than 512 bytes, as two of the five make, are none of the blocks.
    assert resident() - memory < TURNS // 5 * 512 / 2
    counts.release()  # refused as long as anything holds it
    for one in pairs.values():
        for end in one:
            end.close()


@pytest.mark.parametrize(
    ("compiler", "option"),
    [
        ("gcc", "-fopt-info-vec"),
        ("clang", "-Rpass=loop-vectorize"),
    ],
)
def test_compilers_vectorize_the_loop(tmp_path: Path, compiler: str, option: str) -> None:
    """If the optimisation is lost, everything still works but takes three times as long."""
    said = compiled(tmp_path / "_turn.so", option, compiler=compiler)
    lines = SOURCE.read_text().splitlines()
    places = [int(line) for line in re.findall(r"_turn\.c:(\d+):\d+: .*vectorized", said)]
    assert any("for (" in line for line in (lines[place - 1] for place in places)), said


@pytest.mark.parametrize(("switch", "expected"), [("1", f"not using the C module ({SWITCH})")])
def test_switch(switch: str, expected: str) -> None:
    program = "from tcpupperd.serving import turn as t; print(t.implementation, t.turn)"
    command = (sys.executable, "-c", program)
    environment = {**os.environ, SWITCH: switch}
    said = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert said.startswith(f"{expected} <function python_turn")


def test_module_is_as_small_as_promised() -> None:
    assert len(SOURCE.read_text().splitlines()) <= 150
