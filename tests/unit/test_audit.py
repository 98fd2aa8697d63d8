"""What a dead worker owed its clients follows from the kernel's counts and the ledger, wherever it
was killed."""

import contextlib
import importlib.machinery
import importlib.util
import math
import mmap
import os
import random
import select
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from types import ModuleType

import pytest

from c_module import compiled
from integration.measures import scaled
from lines import before_line
from tcpupperd.serving import connection as connections
from tcpupperd.serving import ledger as ledgers
from tcpupperd.serving.audit import Audit, UnknownError
from tcpupperd.serving.connection import Connection, Limits, Next, State
from tcpupperd.serving.counters import Tally
from tcpupperd.serving.fast_path import RECEIVE_SIZE, Receiving, python_fast_path
from tcpupperd.serving.introduction import NOBODY, Introduction
from tcpupperd.serving.lab import LabProtocol
from tcpupperd.serving.ledger import NOTED_MAX, UNKNOWN, Ledger
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol, Protocol
from tcpupperd.serving.proxy import Header, HeaderProtocol
from unit.channels import tcp_pairs
from waiting import until

Use = Callable[[Ledger | None], None]

NEVER = Limits(math.inf, math.inf, math.inf, math.inf, math.inf)
LIVES = scaled(300, 30_000)
HEADER = b"PROXY TCP4 192.0.2.7 192.0.2.8 5000 6000\r\n"
GREETING = b"hello there\n"

#: The program of a worker between two waits.
FILES = ("connection.py", "fast_path.py", "ledger.py", "protocol.py", "proxy.py", "counters.py")


class Death(BaseException):
    """SIGKILL, as far as a process can do this to itself and then look at what is left."""


@pytest.fixture(scope="session")
def c_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    target = tmp_path_factory.mktemp("audit") / "_fast_path.abi3.so"
    compiled(target)
    return loaded(target)


def loaded(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_fast_path", str(path))
    spec = importlib.util.spec_from_loader("_fast_path", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(params=["python", "c"])
def use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Has either implementation of the fast path receive in a ledger."""
    module = request.getfixturevalue("c_module") if request.param == "c" else None
    function = module.fast_path if module else python_fast_path
    monkeypatch.setattr(connections, "fast_path", function)

    def use_ledger(ledger: Ledger | None) -> None:
        Receiving.ledger = ledger
        if module:
            module.share(ledger and ledger.memory)

    yield use_ledger
    use_ledger(None)


class Served:
    """A connection, served by one worker after another, each of which dies at some line."""

    def __init__(
        self,
        use: Use,
        protocol: Callable[[str, object], Protocol],
        service: str = "upper",
        family: int = socket.AF_INET,
    ) -> None:
        if family == socket.AF_UNIX:
            self.client, self.socket = socket.socketpair()
        else:
            ((self.client, self.socket),) = tcp_pairs(1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # as its listener does
        self.client.setblocking(False)
        self.client_address = self.client.getsockname()
        self._use, self._protocol = use, protocol
        self.address = "" if family == socket.AF_UNIX else self.socket.getpeername()
        self.answer = b""
        self.over = False
        self.deaths = 0
        self.ledger = Ledger(1024)
        self.connection = self._connection(service)
        self.connection.began = 1.0
        self.ledger.add(self.connection)
        self.run(lambda: self.connection.open(2.0), math.inf)

    def _connection(self, service: str) -> Connection:
        before, self.ledger = self.ledger, Ledger(1024)
        self._use(self.ledger)
        os.close(before._file)
        tally = Tally()
        tally.ledger = self.ledger
        protocol = self._protocol(service, self.address)
        return Connection(self.socket, self.address, protocol, NEVER, tally)

    def run(self, action: Callable[[], Next | None], lines: float) -> None:
        """Have the worker do something; it dies after this number of lines."""
        try:
            with dying_after(lines), contextlib.suppress(BlockingIOError):
                following = action()
                assert following is not Next.RESET
                self.over = following is Next.CLOSE
        except Death:
            self.deaths += 1
            self.resume(self.audit())

    def audit(self, *, blame: bool = False) -> State:
        """What its keeper finds out."""
        found = Audit(self.ledger, self._protocol).served(self.socket, blame=blame)
        self.address = found.client_address
        return found.state

    def resume(self, state: State) -> None:
        """Have another worker take it over."""
        self.connection = self._connection(state.service)
        self.connection.restore(state, 3.0)
        self.ledger.take(self.connection)
        self.run(lambda: self.connection.resume(3.0), math.inf)

    def handle(self, lines: float = math.inf) -> None:
        self.run(lambda: self.connection.handle(4.0), lines)

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.answer += self.client.recv(2**16)

    def abandon(self) -> None:
        """Close everything as it is."""
        self._use(None)
        self.client.close()
        self.socket.close()
        os.close(self.ledger._file)

    def finish(self) -> bytes:
        """The whole answer, at the end of input."""
        self.client.shutdown(socket.SHUT_WR)
        while not self.over:
            self.handle()
            self.read()
        self.socket.close()
        self.client.setblocking(True)
        while data := self.client.recv(2**16):
            self.answer += data
        self.client.close()
        self._use(None)
        os.close(self.ledger._file)
        return self.answer


@contextlib.contextmanager
def dying_after(lines: float) -> Iterator[None]:
    """Raises Death after a number of lines of the program."""

    def die() -> None:
        raise Death

    if lines < math.inf:
        before_line(int(lines) + 1, lambda path: path.endswith(FILES), die)
    try:
        yield
    finally:
        sys.settrace(None)


def lines_of(chance: random.Random) -> bytes:
    """A few lines, most of them short."""
    sizes = chance.choices(
        [0, 1, 5, 30, 100, 5000, RECEIVE_SIZE, 150_000], [2, 3, 9, 9, 5, 3, 1, 1], k=9
    )
    return b"".join(
        chance.randbytes(8).hex().encode() * (size // 16 + 1) + b"\n" for size in sizes
    )


def live(served: Served, chance: random.Random, text: bytes) -> bytes:
    """Send a text in pieces while workers die; return the whole answer."""
    sent = 0
    while sent < len(text) and not served.over:
        piece = text[sent : sent + chance.choice([1, 3, 20, 200, 10_000, 10**6])]
        with contextlib.suppress(BlockingIOError):
            sent += served.client.send(piece)
        for _ in range(chance.randrange(4)):
            if not served.over:
                served.handle(chance.choice([math.inf, chance.randrange(60), chance.randrange(9)]))
        if chance.random() < 0.7:
            served.read()
    return served.finish()


def line_service(limit: int, max_line: int, opening: bytes) -> Callable[[str, object], Protocol]:
    def protocol(service: str, address: object) -> Protocol:
        def successor(connection: Connection, found: object) -> Protocol | None:
            assert isinstance(found, Header)
            connection.client_address = found.source
            return LineProtocol(max_line, limit, opening)

        return (
            HeaderProtocol(successor)
            if service == "proxy"
            else LineProtocol(max_line, limit, opening)
        )

    return protocol


@pytest.mark.parametrize("service", ["upper", "proxy"])
@pytest.mark.parametrize("opening", [b"", GREETING], ids=["", "greeting"])
@pytest.mark.parametrize("max_line", [10**6, 60], ids=["", "pieces"])
@pytest.mark.parametrize("limit", [0, 5], ids=["", "limit"])
def test_no_byte_is_lost_or_repeated(
    use: Use, service: str, opening: bytes, max_line: int, limit: int
) -> None:
    deaths = 0
    for seed in range(LIVES // 16):
        chance = random.Random(seed)
        text = lines_of(chance)
        served = Served(use, line_service(limit, max_line, opening), service)
        answer = live(served, chance, (HEADER if service == "proxy" else b"") + text)
        answered = b"".join(text.splitlines(keepends=True)[: limit or None])
        assert answer == opening + answered.upper(), seed
        assert served.connection.protocol.lines == (limit or text.count(b"\n"))
        client = ("192.0.2.7", 5000) if service == "proxy" else served.client_address
        assert served.connection.client_address == client
        deaths += served.deaths
    assert deaths > LIVES // 16


def test_no_byte_is_lost_without_framing(use: Use) -> None:
    for seed in range(LIVES // 8):
        chance = random.Random(seed)
        text = lines_of(chance)
        served = Served(use, lambda service, address: ChunkProtocol())
        assert live(served, chance, text) == text.upper(), seed


def test_newcomer_is_of_the_service_that_its_listener_provides() -> None:
    """Whatever the listener is called: systemd names it after the socket unit by default."""
    ((client, server),) = tcp_pairs(1)
    asked = []

    def protocol(listener: str, client_address: object) -> Protocol:
        asked.append((listener, client_address))
        return LineProtocol(100, 0, GREETING)

    with client, server:
        found = Audit(Ledger(64), protocol).newcomer(server, "tcpupperd.socket")
        assert found.state == State(unsent=GREETING, service="upper")
        assert asked == [("tcpupperd.socket", client.getsockname())]


def test_lines_are_counted_that_nobody_had_to_note(use: Use) -> None:
    served = Served(use, line_service(0, 10**6, b""))
    for number in range(3):
        served.client.send(b"one\ntwo\n")
        served.handle()
        state = served.audit()
        assert (state.lines, state.held, state.unsent) == (2 * number + 2, b"", b"")
    assert served.finish() == b"ONE\nTWO\n" * 3


def test_line_that_is_answered_in_pieces_began_with_the_first(use: Use) -> None:
    served = Served(use, line_service(0, 60, b""))
    for size in (100, 10):
        served.client.send(b"x" * size)
        served.handle()
    began = served.connection.line_began
    assert served.audit().line_open_for == pytest.approx(monotonic() - began, abs=1)
    assert served.finish() == b"X" * 110


def test_connection_that_was_being_served_is_under_suspicion(use: Use) -> None:
    served = Served(use, line_service(0, 10**6, b""))
    served.client.send(b"one\n")
    served.ledger.receive(served.socket.fileno())  # and no more
    with pytest.raises(UnknownError, match="it was being served"):
        served.audit(blame=True)
    assert served.audit().unsent == b"ONE\n"
    served.resume(served.audit())
    served.handle()
    assert served.audit(blame=True).lines == 1
    assert served.finish() == b"ONE\n"


def test_only_bytes_are_owed(use: Use) -> None:
    """Not that there is something to say about a connection."""
    served = Served(use, line_service(0, 10**6, b""), "proxy")
    fd = served.socket.fileno()
    assert not served.ledger.owes(fd)
    served.client.send(HEADER[:10])
    served.handle()
    assert served.ledger.owes(fd)
    served.client.send(HEADER[10:])
    served.handle()
    assert not served.ledger.owes(fd)
    served.abandon()


def test_connection_whose_order_was_being_carried_out_is_unknown(use: Use) -> None:
    served = Served(use, lambda service, address: LabProtocol(lambda *_: {}), "lab")
    served.client.send(b"echo one\n")
    served.ledger.receive(served.socket.fileno())  # and no more
    with pytest.raises(UnknownError, match="an order was being carried out"):
        served.audit()
    served.abandon()


def test_too_much_is_not_noted(use: Use) -> None:
    served = Served(use, line_service(0, 10**9, b""))
    served.connection.restore(State(held=b"X" * NOTED_MAX, mid_line=True), 3.0)
    served.ledger.describe(served.connection, b"", bytes(served.connection.protocol.held))
    with pytest.raises(UnknownError, match="there was too much"):
        served.audit()
    served.abandon()


@pytest.mark.parametrize("introduction", [NOBODY, {"authority": "x" * 100}], ids=["", "known"])
@pytest.mark.parametrize("size", [100, NOTED_MAX + 1], ids=["long", "too long"])
def test_what_was_owed_once_does_not_matter(
    use: Use, size: int, introduction: Introduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "_SPARE_MAX", 0)
    served = introduced(use, introduction)
    hold(served, size)
    settle(served)
    state = served.audit()
    assert (state.lines, state.held, state.unsent) == (1, b"", b"")
    assert state.introduction == introduction
    served.abandon()


@pytest.mark.parametrize("introduction", [NOBODY, {"authority": "x" * 100}], ids=["", "known"])
def test_memory_of_long_lines_is_given_back(
    use: Use, introduction: Introduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although what follows needs less."""
    served = introduced(use, introduction)
    for size in (10**6, 100):
        hold(served, size)
        settle(served)
    monkeypatch.setattr(ledgers, "_SPARE_MAX", 0)
    served.ledger.forget(served.socket.fileno())
    hold(served, 100)
    settle(served)
    assert occupied(served.ledger) < 2**18
    served.abandon()


def test_short_lines_take_a_page_each(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_SPARE_MAX", 2 * mmap.PAGESIZE)
    served = introduced(use, NOBODY)
    hold(served, 10)
    before = occupied(served.ledger)
    hold(served, 100)
    assert occupied(served.ledger) > before
    settle(served)
    assert occupied(served.ledger) == before
    served.abandon()


def introduced(use: Use, introduction: Introduction) -> Served:
    """A connection about which a load balancer has said something, or nothing."""
    served = Served(use, line_service(0, 10**9, b""))
    if introduction:
        served.connection.introduction = introduction
        served.ledger.describe(served.connection, b"", b"")
    return served


def hold(served: Served, size: int) -> None:
    served.connection.protocol.resume(0, True, b"x" * size)
    served.ledger.note(served.connection)


def settle(served: Served) -> None:
    served.connection.protocol.resume(1, False, b"")
    served.ledger.note(served.connection)


def occupied(ledger: Ledger) -> int:
    return os.fstat(ledger._file).st_blocks * 512


@pytest.mark.parametrize("received", [True, False], ids=["received", "not received"])
def test_urgent_data_is_not_taken_for_bytes_of_another_client(use: Use, received: bool) -> None:
    """The kernel counts it. If it is not received with the rest, because no daemon has prepared
    the listener yet, then what is in the ledger from an earlier pass is not an answer to it."""
    served = Served(use, line_service(0, 10**6, b""))
    served.socket.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 0)
    served.client.send(b"this was received from another client\n")
    served.handle()
    served.client.send(b"!", socket.MSG_OOB)
    served.client.send(b"one\n")
    until(lambda: select.select([served.socket], [], [], 0)[0])
    if received:
        served.ledger.receive(served.socket.fileno())
    served.ledger._begin(served.socket.fileno(), UNKNOWN)
    with pytest.raises(UnknownError, match="it is not known what it has sent"):
        served.audit()
    served.abandon()


@pytest.mark.parametrize("size", [10, 5000], ids=["short", "long"])
def test_local_connection_is_known_unless_something_is_unsent(use: Use, size: int) -> None:
    served = Served(use, line_service(0, 10**6, b""), family=socket.AF_UNIX)
    served.client.send(b"one\n" + b"x" * size)
    served.handle()
    assert served.audit().held == b"X" * size
    served.connection.unsent = memoryview(b"left")
    served.ledger.note(served.connection)
    with pytest.raises(UnknownError, match="a Unix socket does not say"):
        served.audit()
    served.connection.unsent = memoryview(b"")
    assert served.finish() == b"ONE\n" + b"X" * size


def test_forged_ledger_is_not_believed(use: Use) -> None:
    """Whatever is in it, a connection is either what the kernel says or unknown."""
    chance = random.Random(1)
    for _ in range(scaled(2000, 50_000)):
        served = Served(use, line_service(0, 10**6, b""))
        served.client.send(b"one\ntw")
        served.handle()
        fd = served.socket.fileno()
        for _ in range(chance.randrange(1, 40)):
            start = chance.choice([0, 73728 + 32 * fd, served.ledger._records + 256 * fd])
            served.ledger.memory[start + chance.randrange(32)] = chance.randrange(256)
        with contextlib.suppress(UnknownError):
            state = served.audit()
            assert len(state.unsent) + len(state.held) < 2**17
        served.abandon()
