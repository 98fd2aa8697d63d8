"""What is left for the next process: nothing is lost, nothing is handed out twice."""

import errno
import os
import random
import socket
import ssl
from collections.abc import Iterable, Iterator
from functools import partial
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive import items
from outlive.channel import Channel, Format, HandoverError, send
from outlive.items import FILES_MAX, Arrival, Client, Handover, Item
from outlive.leaving import Leaving, Left

FORM = Format(b"test", 1)
LIMIT = 10**6


@pytest.fixture
def channel() -> Iterator[Channel]:
    with make_channel() as found:
        yield found


class make_channel:  # noqa: N801  used like a function
    def __enter__(self) -> Channel:
        self._ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return Channel(*self._ends, False)

    def __exit__(self, *exception: object) -> None:
        for end in self._ends:
            end.close()


def leave(
    channel: Channel, left: list[Left], *, whole: bool = False, files_max: int = FILES_MAX
) -> list[Left]:
    handover = Handover(channel.send_end, FORM)
    try:
        return Leaving[Left](handover, {}, whole=whole).leave(left, files_max)
    finally:
        handover.close()


def arrived(channel: Channel) -> list[Client | Item]:
    """Everything in the channel."""
    found: list[Client | Item] = []
    while True:
        try:
            arrival = Arrival(channel.receive_end, FORM, LIMIT)
        except BlockingIOError:
            return found
        found += [one for one in arrival if isinstance(one, (Client, Item))]


def pairs(number: int) -> tuple[list[socket.socket], list[socket.socket]]:
    """Connections, and their clients."""
    both = [socket.socketpair() for _ in range(number)]
    return [one for one, _ in both], [other for _, other in both]


def pipe(content: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading


def close(things: Iterable[Client | Item | socket.socket]) -> None:
    for thing in things:
        if isinstance(thing, socket.socket):
            thing.close()
        else:
            for fd in thing.files:
                os.close(fd)
            if isinstance(thing, Client):
                thing.socket.close()


KINDS = st.tuples(st.sampled_from(["client", "item"]), st.integers(0, 3), st.binary(max_size=30))


@given(st.lists(KINDS, max_size=30), st.integers(4, FILES_MAX), st.booleans())
def test_all_arrives_in_order(
    kinds: list[tuple[str, int, bytes]], files_max: int, whole: bool
) -> None:
    """Whatever is left, in messages of whatever size."""
    left: list[Left] = []
    clients: list[socket.socket] = []
    for kind, files, state in kinds:
        pipes = tuple(pipe(b"%d" % number) for number in range(files))
        if kind == "item":
            left.append(Item(state, pipes))
        else:
            one, client = socket.socketpair()
            left.append(Client(one, state, listener="some", files=pipes))
            clients.append(client)
    with make_channel() as channel:
        before = len(os.listdir("/proc/self/fd"))
        assert leave(channel, left, whole=whole, files_max=files_max) == []
        expected = sum(files + (kind == "client") for kind, files, _ in kinds)
        assert before - len(os.listdir("/proc/self/fd")) == expected
        found = arrived(channel)
    assert [(item.state, len(item.files)) for item in found] == [(s, n) for _, n, s in kinds]
    for item in found:
        assert [os.read(fd, 9) for fd in item.files] == [b"%d" % n for n in range(len(item.files))]
    there = iter(clients)
    for item in found:
        if isinstance(item, Client):
            assert item.listener == "some"
            item.socket.send(b"to its client")
            assert next(there).recv(20) == b"to its client"
    close(found)
    close(clients)


def test_pair_is_enough_for_a_connection(channel: Channel) -> None:
    (one,), (client,) = pairs(1)
    with client:
        assert leave(channel, [(one, b"state")]) == []
        assert one.fileno() == -1
        (found,) = arrived(channel)
        assert isinstance(found, Client)
        assert found[1:] == (b"state", "", "", ())
        assert not found.socket.getblocking()
        close([found])


def test_what_was_not_handed_out_waits_for_the_next_process(channel: Channel) -> None:
    """The first process dies when it has been given three of ten."""
    connections, clients = pairs(10)
    leave(channel, [(one, b"%d" % number) for number, one in enumerate(connections)])
    dying = iter(Arrival(channel.receive_end, FORM, LIMIT))
    first = [next(dying) for _ in range(3)]
    assert [one.state for one in first if isinstance(one, Client)] == [b"0", b"1", b"2"]
    after = Arrival(channel.receive_end, FORM, LIMIT)
    assert after.lost == 3
    rest = list(after)
    assert [one.state for one in rest if isinstance(one, Client)] == [
        b"%d" % number for number in range(3, 10)
    ]
    assert arrived(channel) == []
    close([one for one in (*first, *rest) if isinstance(one, Client)])
    close(clients)


def test_whole_handover_that_does_not_fit_leaves_nothing(channel: Channel) -> None:
    channel.send_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connections, clients = pairs(40)
    left: list[Left] = [(one, b"state") for one in connections]
    assert leave(channel, left, whole=True, files_max=1) == left
    for one, client in zip(connections, clients, strict=True):
        one.send(b"still served")
        assert client.recv(20) == b"still served"
    assert arrived(channel) == []
    close(connections)
    close(clients)


def test_handover_that_is_not_complete_does_not_count(channel: Channel) -> None:
    """A process that is killed while it leaves as a whole has left nothing."""
    (one,), (client,) = pairs(1)
    handover = Handover(channel.send_end, FORM)
    handover.send([items.Record.of_client(Client(one, b"state"))])
    one.close()
    handover.close()
    assert arrived(channel) == []
    with client:
        assert client.recv(1) == b""


def test_what_does_not_fit_is_returned(channel: Channel) -> None:
    channel.send_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connections, clients = pairs(40)
    left: list[Left] = [(one, b"state") for one in connections]
    rest = leave(channel, left, files_max=1)
    assert 0 < len(rest) < 40
    assert rest == left[-len(rest) :]
    found = arrived(channel)
    assert len(found) + len(rest) == 40
    close(found)
    close(connections)
    close(clients)


def test_item_with_too_many_descriptors_is_returned(channel: Channel) -> None:
    big, small = Item(b"big", tuple(pipe(b"") for _ in range(FILES_MAX + 1))), Item(b"small")
    assert leave(channel, [big, small]) == [big]
    assert arrived(channel) == [small]
    close([big])


def test_tls_connection_is_returned_and_said_so(
    channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    connections, clients = pairs(2)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(connections[0], do_handshake_on_connect=False) as secret:
        left: list[Left] = [(secret, b"state"), (connections[1], b"state")]
        assert leave(channel, left) == left[:1]
    assert "TLS" in caplog.text
    close(arrived(channel))
    close(clients)


def test_state_that_fits_nowhere_costs_its_own_connection(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memfds, a socket carries the state, which has its limit."""
    monkeypatch.setattr(os, "memfd_create", failing)
    connections, clients = pairs(4)
    left: list[Left] = [(one, b"state") for one in connections]
    left[2] = connections[2], bytes(2**24)
    assert leave(channel, left) == [left[2]]
    found = arrived(channel)
    assert len(found) == 3
    close(found)
    close(connections)
    close(clients)


def write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def failing(name: str, flags: int) -> int:
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_message_waits_until_there_is_room(channel: Channel) -> None:
    (one,), (client,) = pairs(1)
    leave(channel, [(one, b"state")])
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Too many open files"):
        Arrival(channel.receive_end, FORM, 4)
    assert os.listdir("/proc/self/fd") == before
    found = arrived(channel)
    assert len(found) == 1
    close(found)
    client.close()


def test_damaged_state_costs_its_message(channel: Channel) -> None:
    """Any bytes but those that were written are reported, and nothing is left open."""
    (one,), (client,) = pairs(1)
    left = [items.Record.of_client(Client(one, b"the state", listener="name"))]
    with open(os.memfd_create("state"), "w+b") as file:
        items._write(left, file)
        file.seek(0)
        good = file.read()
    chance = random.Random(0)
    for _ in range(200):
        length = chance.randrange(len(good))
        bad = good[:length] + chance.randbytes(chance.randrange(4))
        if len(bad) == len(good):  # only the state itself may differ
            continue
        own = [items._Descriptor(items._counter()) for _ in range(2)]
        send(channel.send_end, FORM, [*own, one], partial(write, bad))
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(HandoverError) as error:
            Arrival(channel.receive_end, FORM, LIMIT)
        assert len(error.value.sockets) == 1
        close(error.value.sockets)
        assert len(os.listdir("/proc/self/fd")) == before
        for fd in own:
            os.close(fd)
    assert arrived(channel) == []
    one.close()
    client.close()


@pytest.mark.parametrize(("kind", "files"), [(3, 0), (3, 1), (255, 0), (0, 0), (2, 1)])
def test_item_that_cannot_be_costs_its_message(channel: Channel, kind: int, files: int) -> None:
    """Of an unknown kind, a connection without a socket, or a note with a descriptor: it is not
    taken for something else."""
    (one,), (client,) = pairs(1)
    unusual = items._RECORD.pack(kind, files, 0, 0)
    count = items._HEAD.pack(items.VERSION, 2 - files)
    whole = items._RECORD.pack(items.Kind.CLIENT, 1, 0, 0) * (1 - files)
    own = [items._Descriptor(items._counter()) for _ in range(2)]
    send(channel.send_end, FORM, [*own, one], partial(write, count + whole + unusual))
    with pytest.raises(HandoverError, match=f"of kind {kind} and has {files}") as error:
        Arrival(channel.receive_end, FORM, LIMIT)
    assert len(error.value.sockets) == 1
    close([*error.value.sockets, one, client])
    for fd in own:
        os.close(fd)


@pytest.mark.parametrize(("name", "version"), [(b"longer than", 1), (b"", 1), (b"x", 65536)])
def test_format_that_does_not_fit_is_an_error(name: bytes, version: int) -> None:
    with pytest.raises(ValueError, match="must"):
        Format(name, version)
