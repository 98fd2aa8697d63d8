"""What outlive.aio keeps of a connection, without a service around it."""

import asyncio
import socket
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive import Client
from outlive.aio import CHUNK, Reader, Tail, _fill, _Link, _Saved, _Server, _Users

DATA = st.binary(max_size=9)


@given(st.lists(st.tuples(DATA, st.integers(0, 40), st.booleans())), st.integers(0, 40))
def test_tail_is_what_was_written_last(writes: list[tuple[bytes, int, bool]], sent: int) -> None:
    """Whatever a transport sends in between, and whenever the tail is trimmed."""
    tail, buffer = Tail(), b""
    for data, taken, trims in writes:
        buffer = buffer[taken:] + data
        tail.wrote(data, lambda: len(buffer))  # noqa: B023  it is called immediately
        if trims:
            tail.trim(len(buffer))
    buffer = buffer[sent:]
    assert tail.last(len(buffer)) == buffer


def test_tail_does_not_grow() -> None:
    """While a client reads as fast as the service writes, however little is unsent."""
    for unsent in (0, 1, 1000):
        tail = Tail()
        for _ in range(10_000):
            tail.wrote(bytes(10), lambda: unsent)  # noqa: B023
        assert len(b"".join(tail._parts)) <= 3 * unsent + 10


@given(st.integers(0, 3), DATA, DATA, DATA)
def test_saved_connection_is_restored(
    flags: int, state: bytes, unsent: bytes, unread: bytes
) -> None:
    saved = _Saved(flags, state, unsent, unread)
    assert _Saved.unpack(saved.pack()) == saved


@given(st.binary())
def test_unknown_form_is_rejected(data: bytes) -> None:
    form = _Saved(0, b"", b"", b"").pack()[:1]
    if data[:1] != form:
        with pytest.raises(ValueError, match="unknown form"):
            _Saved.unpack(data)


def received(*parts: bytes) -> Reader:
    """A reader that has received this."""
    reader = Reader(1000, asyncio.get_running_loop(), _Users())
    for part in parts:
        reader.feed_data(part)
    return reader


def run(test: Any) -> Any:
    """Run a coroutine function as a test."""
    return lambda: asyncio.run(test())


@run
async def test_unread_is_what_was_not_given_out() -> None:
    reader = received(b"one\ntwo\nthr", b"ee")
    assert await reader.readline() == b"one\n"
    assert await reader.readexactly(2) == b"tw"
    assert reader.unread() == b"o\nthree"


@run
async def test_block_is_read_again_as_a_whole() -> None:
    reader = received(b"zero 1 12 123 rest")
    await reader.readuntil(b" ")
    with reader.atomic():
        await reader.readuntil(b" ")
        with reader.atomic():
            await reader.readuntil(b" ")
        with suppress(ZeroDivisionError), reader.atomic():
            await reader.readuntil(b" ")
            raise ZeroDivisionError
        assert reader.unread() == b"1 rest"


@run
async def test_block_that_is_complete_is_not_read_again() -> None:
    reader = received(b"1 12 123 rest")
    with reader.atomic():
        await reader.readuntil(b" ")
    with reader.atomic():
        await reader.readuntil(b" ")
        assert reader.unread() == b"12 123 rest"


@run
async def test_reading_to_the_end_is_one_call() -> None:
    """In which asyncio calls `read` several times."""
    reader = received(b"a" * 1500)
    task = asyncio.create_task(reader.read())
    await asyncio.sleep(0)
    reader.feed_data(b"b" * 500)
    await asyncio.sleep(0)
    assert reader.unread() == b"a" * 1500 + b"b" * 500
    task.cancel()


@run
async def test_stopped_reader_gives_out_nothing() -> None:
    users = _Users()
    reader = Reader(1000, asyncio.get_running_loop(), users)
    reader.feed_data(b"one\n")
    reader.stop()
    task = asyncio.create_task(reader.readline())
    await asyncio.sleep(0)
    assert users.all_wait
    task.cancel()
    assert reader.unread() == b"one\n"


@run
async def test_all_tasks_must_wait() -> None:
    users, event = _Users(), asyncio.Event()

    async def use() -> None:
        with users.waiting():
            await event.wait()
        await asyncio.sleep(0)

    assert not users.all_wait
    tasks = [asyncio.create_task(use()) for _ in range(2)]
    await asyncio.sleep(0)
    assert users.all_wait
    event.set()
    await asyncio.sleep(0)
    assert not users.all_wait
    await asyncio.wait(tasks)
    with users.waiting(), users.waiting():
        assert users.all_wait
    assert not users.all_wait


@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_transport_sends_what_is_not_handed_over(name: str) -> None:
    """And nothing else: uvloop, unlike asyncio, sends more after a transport was aborted."""
    if not find_spec(name):
        pytest.skip(f"{name} is not installed (pip install {name})")
    received = 0

    def receive() -> None:
        nonlocal received
        with suppress(BlockingIOError):
            while True:
                received += len(theirs.recv(10**6))

    async def take() -> tuple[socket.socket, int]:
        loop = asyncio.get_running_loop()
        link = _Link(cast(Any, SimpleNamespace(links=set())), Client(ours))
        link.begin = asyncio.Protocol  # type: ignore[method-assign]
        link.save = lambda: (b"", b"")  # type: ignore[method-assign]
        await loop.connect_accepted_socket(lambda: link, ours)
        link.transport.write(bytes(10**7))
        link.transport.writelines([bytes(10**6 - 1), bytes(1)])
        link.take()
        while not link.is_lost:
            receive()
            await asyncio.sleep(0)
        receive()
        sock, unsent = link.ended
        return sock, len(unsent)

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with theirs:
        taken, unsent = import_module(name).run(take())
        assert unsent > 0
        assert received == 11 * 10**6 - unsent
        with taken, pytest.raises(BlockingIOError):  # still connected
            theirs.recv(1)


def test_unsent_answers_pause_the_protocol_until_they_are_sent() -> None:
    """Those of the previous process, too; and they are forgotten then."""
    events: list[str] = []

    class Recorded(asyncio.Protocol):
        def pause_writing(self) -> None:
            events.append("pause")

        def resume_writing(self) -> None:
            events.append("resume")

    async def send() -> None:
        loop = asyncio.get_running_loop()
        saved = _Saved(0, b"", bytes(10**7), b"")
        link = _Link(cast(Any, SimpleNamespace(links=set())), Client(ours, saved.pack()))
        link.begin = Recorded  # type: ignore[method-assign]
        transport, _ = await loop.connect_accepted_socket(lambda: link, ours)
        assert events == ["pause"]
        while len(events) < 2:
            with suppress(BlockingIOError):
                theirs.recv(10**6)
            await asyncio.sleep(0)
        assert events == ["pause", "resume"]
        assert len(b"".join(link.transport._tail._parts)) <= transport.get_write_buffer_limits()[0]
        transport.close()

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with theirs:
        asyncio.run(send())


@run
async def test_protocol_receives_nothing_after_it_has_told_its_state() -> None:
    """However many there are: what is ready is taken before the loop continues."""
    loop = asyncio.get_running_loop()

    class Ready:
        """A connection whose client would send as soon as the loop continues."""

        sends: asyncio.Handle | None = None
        has_received = False

        @property
        def is_ready(self) -> bool:
            self.sends = self.sends or loop.call_soon(self.receive)
            return True

        def receive(self) -> None:
            self.has_received = True

        def take(self) -> None:
            assert self.sends
            self.sends.cancel()
            server.links.discard(cast(Any, self))

    server = _Server(cast(Any, None), cast(Any, None), lambda: None)
    links = [Ready() for _ in range(3 * CHUNK)]
    server.links.update(cast(Any, links))
    assert not await server._take_ready([])
    assert not any(link.has_received for link in links)


@given(st.lists(DATA), st.integers(1, 5))
def test_protocol_with_a_buffer_gets_everything(parts: list[bytes], size: int) -> None:
    class Protocol(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.buffer, self.got = bytearray(size), b""

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.got += self.buffer[:nbytes]

    protocol = Protocol()
    for part in parts:
        _fill(protocol, part)
    assert protocol.got == b"".join(parts)
