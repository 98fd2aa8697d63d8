"""The fast path, in Python and in C: one contract, and what only the C one could do wrong."""

import contextlib
import errno
import faulthandler
import gc
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn

import pytest

from c_module import SOURCE, compiled
from fuzz import fast_paths
from fuzz.fast_paths import RESET_AT_CLOSE, FastPath, c_fast_path, tcp_pair
from integration.measures import scaled
from integration.processes import cannot
from tcpupperd.serving.fast_path import RECEIVE_SIZE, SWITCH, python_fast_path
from tcpupperd.serving.protocol import HELD_MAX
from tools import need
from waiting import DEADLINE

ROOT = Path(__file__).parents[2]
FUZZ_CASES = scaled(2_000, 1_000_000)
CALLS = scaled(100_000, 1_000_000)

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(scope="session")
def c_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C module as it is in the tree, whatever is installed."""
    target = tmp_path_factory.mktemp("fast_path") / "_fast_path.abi3.so"
    compiled(target)
    return target


@pytest.fixture(params=["python", "c"])
def fast_path(request: pytest.FixtureRequest) -> FastPath:
    """Either implementation."""
    if request.param == "python":
        return python_fast_path
    return c_fast_path(request.getfixturevalue("c_module"))


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
    fast_path: FastPath, pair: Pair, counts: "array[int]", data: bytes, lines: int
) -> None:
    for number in (1, 2):
        assert fast_path(sent(pair, data), counts, b"") is None
        assert received(pair[0], len(data)) == data.upper()
        assert list(counts) == [number * lines, number * len(data)]


@pytest.mark.parametrize("held", [b"", b"X", b"HELD " * 800, b"H" * HELD_MAX])
@pytest.mark.parametrize("data", [b"h", b"hello", b"one\ntwo", b"\n\0", b"a\n\nb" * 99, b"z\n"])
def test_what_is_complete_is_answered_and_the_rest_handed_back(
    fast_path: FastPath, pair: Pair, counts: "array[int]", held: bytes, data: bytes
) -> None:
    complete, newline, rest = (held + data.upper()).rpartition(b"\n")
    assert fast_path(sent(pair, data), counts, held) == (rest or None)
    assert list(counts) == [data.count(b"\n"), len(complete + newline)]
    pair[1].close()
    assert pair[0].makefile("rb").read() == complete + newline


def test_end_of_file_is_handed_back(fast_path: FastPath, pair: Pair, counts: "array[int]") -> None:
    fd = sent(pair, b"last\n")
    pair[0].shutdown(socket.SHUT_WR)
    assert fast_path(fd, counts, b"") is None
    assert fast_path(fd, counts, b"HELD") == b""
    assert list(counts) == [1, 5]


def test_no_more_than_its_size_is_received(fast_path: FastPath, counts: "array[int]") -> None:
    client, server = socket.socketpair()
    with client, server:
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            client.setsockopt(socket.SOL_SOCKET, buffer, 4 * RECEIVE_SIZE)
            server.setsockopt(socket.SOL_SOCKET, buffer, 4 * RECEIVE_SIZE)
        fd = sent((client, server), b"y" * (RECEIVE_SIZE - 1) + b"\n" + b"next\n")
        assert fast_path(fd, counts, b"") is None
        assert list(counts) == [1, RECEIVE_SIZE]
        assert fast_path(fd, counts, b"") is None
        assert list(counts) == [2, RECEIVE_SIZE + 5]


def test_part_that_the_kernel_does_not_take_is_handed_back(
    fast_path: FastPath, counts: "array[int]"
) -> None:
    client, server = socket.socketpair()
    with client, server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        data = b"abcdefghi\n" * 6000
        outcome = fast_path(sent((client, server), data + b"next"), counts, b"HELD ")
        assert isinstance(outcome, tuple)
        unsent, rest = outcome
        assert 0 < len(unsent) < len(data)
        assert rest == b"NEXT"
        assert list(counts) == [6000, 5 + len(data) - len(unsent)]
        assert received(client, counts[1]) + unsent == b"HELD " + data.upper()


def test_answer_is_handed_back_where_the_kernel_takes_nothing(
    fast_path: FastPath, pair: Pair, counts: "array[int]"
) -> None:
    fd = sent(pair, b"hello\n")
    filled(pair[1])
    assert fast_path(fd, counts, b"SAY ") == (b"SAY HELLO\n", b"")
    assert list(counts) == [1, 0]


def test_nothing_to_receive(fast_path: FastPath, pair: Pair, counts: "array[int]") -> None:
    with pytest.raises(BlockingIOError):
        fast_path(pair[1].fileno(), counts, b"")
    assert list(counts) == [0, 0]


def test_connection_that_was_reset(fast_path: FastPath, counts: "array[int]") -> None:
    client, server = tcp_pair()
    with client, server:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        client.close()
        assert fast_path(server.fileno(), counts, b"") == errno.ECONNRESET


def test_client_that_disconnects_before_its_answer(
    fast_path: FastPath, counts: "array[int]"
) -> None:
    client, server = socket.socketpair()
    with client, server:
        fd = sent((client, server), b"hello\n")
        client.close()
        assert fast_path(fd, counts, b"") == errno.EPIPE
        assert list(counts) == [1, 0]


def test_descriptor_other_than_a_socket(fast_path: FastPath, counts: "array[int]") -> None:
    assert fast_path(-1, counts, b"") == errno.EBADF
    with pytest.raises(TypeError):
        fast_path("1", counts, b"")  # type: ignore[arg-type]


def test_counts_may_be_a_part_of_a_shared_mapping(fast_path: FastPath, pair: Pair) -> None:
    with mmap(-1, 4096) as mapping, memoryview(mapping) as bytewise, bytewise.cast("Q") as all_:
        all_[5:9] = memoryview(array("Q", [5, 2**32 - 1, 2**63, 8]))
        with all_[6:8] as counts:
            assert fast_path(sent(pair, b"one\ntwo\n"), counts, b"") is None
        assert list(all_[5:9]) == [5, 2**32 + 1, 2**63 + 8, 8]


@pytest.mark.parametrize("counts", [array("Q", [0]), array("I", [0] * 4), bytes(16), None])
def test_counts_of_another_kind_are_refused(c_module: Path, pair: Pair, counts: object) -> None:
    fd = sent(pair, b"hello\n")
    with pytest.raises((ValueError, TypeError, BufferError)):
        c_fast_path(c_module)(fd, counts, b"")
    assert pair[1].recv(100) == b"hello\n"


@pytest.mark.parametrize("held", [b"x" * (HELD_MAX + 1), bytearray(b"x"), None])
def test_held_of_another_kind_is_refused(
    c_module: Path, pair: Pair, counts: "array[int]", held: Any
) -> None:
    fd = sent(pair, b"hello\n")
    with pytest.raises((ValueError, TypeError)):
        c_fast_path(c_module)(fd, counts, held)
    assert pair[1].recv(100) == b"hello\n"


@pytest.mark.parametrize("full", [[2**64 - 1, 0], [0, 2**64 - 3]])
def test_count_that_would_exceed_64_bits_raises(
    fast_path: FastPath, pair: Pair, full: list[int]
) -> None:
    counts = array("Q", full)
    fd = sent(pair, b"hello\n")
    with pytest.raises(OverflowError):
        fast_path(fd, counts, b"")
    assert (counts[0], counts[1]) in ((2**64 - 1, 0), (1, 2**64 - 3))
    assert received(pair[0], 6) == b"HELLO\n"


class Nested:
    """Garbage whose finalizer takes the fast path of another connection."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.cycle = self

    def __del__(self) -> None:
        self.call()


def test_finalizer_may_take_the_fast_path(fast_path: FastPath, counts: "array[int]") -> None:
    """While the objects of an outcome are made, the collector may run. The answer to one client
    must not become that to another."""
    ours, other = socket.socketpair(), socket.socketpair()
    with ours[0], ours[1], other[0], other[1]:
        for end in (*ours, *other):
            end.setblocking(False)
        filled(ours[1])
        ours[0].send(b"mine\nmy rest")
        other[0].send(b"b" * 500)
        fd, thresholds = ours[1].fileno(), gc.get_threshold()
        nested = partial(fast_path, other[1].fileno(), array("Q", [0, 0]), b"")
        gc.collect()
        gc.disable()
        pairs = [(number, number) for number in range(5000)]  # uses up those that are kept
        Nested(nested)
        gc.set_threshold(1)
        gc.enable()  # from now on, the next object makes it run
        try:
            outcome = fast_path(fd, counts, b"")
        finally:
            gc.set_threshold(*thresholds)
        gc.collect()
        assert outcome == (b"MINE\n", b"MY REST")
        assert len(pairs) == 5000


def test_interrupted_receiving_continues(fast_path: FastPath, counts: "array[int]") -> None:
    client, server = socket.socketpair()
    with client, server, alarm_handler(lambda *_: client.sendall(b"hello\n")):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert fast_path(server.fileno(), counts, b"") is None  # blocking, for once
        assert client.recv(100) == b"HELLO\n"


def test_signal_handler_may_raise(fast_path: FastPath, counts: "array[int]") -> None:
    def handler(*_: object) -> NoReturn:
        raise ZeroDivisionError

    def interrupted() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        fast_path(server.fileno(), counts, b"")

    client, server = socket.socketpair()
    with client, server, alarm_handler(handler):
        with pytest.raises(ZeroDivisionError):  # it may come before the call on a busy machine
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
            assert c_fast_path(c_module)(fd, counts, b"") == errno.EPIPE
        assert signal.SIGPIPE not in signal.sigpending()
    finally:
        signal.signal(signal.SIGPIPE, before)  # which forgets one that is pending
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})


def test_threads_do_not_meet(fast_path: FastPath) -> None:
    """One waits in the midst of its answer while another gets there."""
    # A thread that keeps the interpreter while it waits would stop this one, too.
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    client, server = socket.socketpair()
    with client, server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        data = (b"a" * 99 + b"\n") * 600
        fd = sent((client, server), data)
        server.setblocking(True)
        thread = threading.Thread(
            target=fast_path, args=(fd, array("Q", [0, 0]), b""), daemon=True
        )
        thread.start()
        answer = client.recv(100, socket.MSG_WAITALL)
        other, its_server = socket.socketpair()
        with other, its_server:
            fd = sent((other, its_server), b"b" * 60_000 + b"\n")
            assert fast_path(fd, array("Q", [0, 0]), b"") is None
        answer += received(client, len(data) - 100)
        thread.join(DEADLINE)
    faulthandler.cancel_dump_traceback_later()
    assert answer == data.upper()


def test_fuzz(c_module: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    fast_paths.fuzz(c_fast_path(c_module), FUZZ_CASES, seed)


def test_fuzz_under_sanitizers(tmp_path: Path) -> None:
    """No byte is read or written that is not the module's, and nothing is undefined."""
    target = tmp_path / "_fast_path.abi3.so"
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
    command = (sys.executable, "-m", "fuzz.fast_paths", str(target), str(FUZZ_CASES))
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def resident() -> int:
    """Bytes of memory that this process has at present."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def every_outcome(
    fast_path: FastPath, pairs: dict[str, Pair], counts: "array[int] | memoryview"
) -> None:
    """Six calls, each with another outcome."""
    client, server = pairs["free"]
    data = b"x" * 999 + b"\n"
    client.send(data)
    assert fast_path(server.fileno(), counts, b"") is None
    client.recv(1000)
    client.send(data[:-1])
    assert fast_path(server.fileno(), counts, b"HELD ") == b"HELD " + data[:-1].upper()
    with contextlib.suppress(BlockingIOError):
        fast_path(server.fileno(), counts, b"")
    assert fast_path(pairs["ended"][1].fileno(), counts, b"HELD") == b""
    assert fast_path(-1, counts, b"") == errno.EBADF
    client, server = pairs["full"]
    client.send(data + b"rest")
    assert fast_path(server.fileno(), counts, b"") == (data.upper(), b"REST")


def test_nothing_leaks(fast_path: FastPath) -> None:
    """Not an object, not a reference, not a buffer that is held: of each there would be one for
    every turn, against a bound of one for ten."""
    pairs = {name: socket.socketpair() for name in ("free", "ended", "full")}
    for _, server in pairs.values():
        server.setblocking(False)
    pairs["ended"][0].close()
    filled(pairs["full"][1])
    counts = memoryview(bytearray(16)).cast("Q")
    held = (counts, None, True, False, BlockingIOError)
    every_outcome(fast_path, pairs, counts)
    before = [sys.getallocatedblocks(), *map(sys.getrefcount, held)]
    memory = resident()
    for _ in range(CALLS // 5):
        every_outcome(fast_path, pairs, counts)
    after = [sys.getallocatedblocks(), *map(sys.getrefcount, held)]
    assert max(now - was for now, was in zip(after, before, strict=True)) < CALLS // 50
    # Objects of more than 512 bytes, as two of the five make, are none of the blocks.
    assert resident() - memory < CALLS // 5 * 512 / 2
    counts.release()  # refused as long as anything holds it
    for one in pairs.values():
        for end in one:
            end.close()


@pytest.mark.parametrize(("switch", "expected"), [("1", f"not using the C module ({SWITCH})")])
def test_switch(switch: str, expected: str) -> None:
    program = "from tcpupperd.serving import fast_path as f; print(f.implementation, f.fast_path)"
    command = (sys.executable, "-c", program)
    environment = {**os.environ, SWITCH: switch}
    said = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert said.startswith(f"{expected} <function python_fast_path")


def test_module_is_as_small_as_promised() -> None:
    assert len(SOURCE.read_text().splitlines()) <= 350
