"""Unreadable handover messages, and what happens to the connections."""

import contextlib
import math
import os
import resource
import socket
import struct
import tracemalloc
from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outlive.channel import BATCH, GREETING, Channel, HandoverError
from tcpupperd.processes import connection_format
from tcpupperd.processes.connection_format import Connection, receive, send
from tcpupperd.serving.connection import State
from unit.channels import MAX_LINE, close, is_served_by, receive_from, state_of, tcp_pairs
from unit.conftest import open_descriptors


def send_raw(
    channel: Channel, greeting: bytes, state: bytes, sockets: list[socket.socket], size: int = 0
) -> None:
    """Put a message into the channel as `send` does, right or wrong, with a state of `size`."""
    file = os.memfd_create("state", os.MFD_CLOEXEC)
    os.write(file, state)
    os.truncate(file, size or len(state))
    socket.send_fds(channel.send_end, [greeting], [file, *(one.fileno() for one in sockets)])
    os.close(file)


def capture(connections: list[Connection]) -> tuple[bytes, bytes]:
    """The greeting and the state of a good message."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    send(ends[0], connections)
    greeting, files, *_ = socket.recv_fds(ends[1], 100, BATCH + 1)
    size = os.fstat(files[0]).st_size
    state = os.pread(files[0], size, 0)
    for fd in files:
        os.close(fd)
    close(ends)
    return greeting, state


class Damage:
    """Two connections with a good message of theirs, to be sent in many bad ways."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.pairs = [socket.socketpair(), socket.socketpair()]
        self.servers = [server for _, server in self.pairs]
        connections = [
            Connection(self.servers[0], "", State(lines=3, held=b"half a li", mid_line=True)),
            Connection(
                self.servers[1], ("192.0.2.1", 5), State(unsent=b"ANSWER\n", lingers_for=1.0)
            ),
        ]
        self.greeting, self.state = capture(connections)

    def close(self) -> None:
        for pair in self.pairs:
            close(pair)

    def refused(self, greeting: bytes, state: bytes) -> str:
        """The complaint about a message; both connections must be left and nothing else."""
        before = open_descriptors()
        send_raw(self.channel, greeting, state, self.servers)
        with pytest.raises(HandoverError) as caught:
            receive_from(self.channel)
        self.check(caught.value.sockets, before)
        return str(caught.value)

    def survived(self, state: bytes) -> None:
        """Whatever the state says, both connections must be left and nothing else."""
        before = open_descriptors()
        send_raw(self.channel, self.greeting, state, self.servers)
        try:
            taken = receive_from(self.channel)
        except HandoverError as error:
            left = error.sockets
        else:
            left = [connection.socket for connection in taken]
            states = [connection.state for connection in taken]
            times = [(one.idle_for, one.line_open_for, one.lingers_for or 0) for one in states]
            assert all(abs(time) < 1e9 for time in chain(*times))
        self.check(left, before)

    def check(self, left: list[socket.socket], before: set[int]) -> None:
        assert len(left) == len(self.pairs)
        for (client, _), server in zip(self.pairs, left, strict=True):
            assert is_served_by(client, server)
        close(left)
        assert open_descriptors() == before


@pytest.fixture
def damage(channel: Channel) -> Iterator[Damage]:
    damage = Damage(channel)
    yield damage
    damage.close()


def test_good_message_of_the_fixture_is_good(damage: Damage) -> None:
    send_raw(damage.channel, damage.greeting, damage.state, damage.servers)
    taken = receive_from(damage.channel)
    assert [connection.state.held for connection in taken] == [b"half a li", b""]
    damage.check(
        [connection.socket for connection in taken],
        open_descriptors() - {connection.socket.fileno() for connection in taken},
    )


@pytest.mark.parametrize("version", [0, connection_format.VERSION + 1, 65535])
def test_another_version_is_refused_and_named(damage: Damage, version: int) -> None:
    greeting = GREETING.pack(b"tcpupperd\0", version, 2)
    complaint = damage.refused(greeting, damage.state)
    assert complaint.endswith(f"version {version}, not version {connection_format.VERSION}")


@pytest.mark.parametrize("count", [0, 1, 3, 252, 65535])
def test_invalid_count_is_rejected(damage: Damage, count: int) -> None:
    greeting = GREETING.pack(b"tcpupperd\0", connection_format.VERSION, count)
    assert damage.refused(greeting, damage.state) == f"{count} connections came with 2 sockets"


def test_greeting_is_refused_at_any_other_length(damage: Damage) -> None:
    for size in range(1, len(damage.greeting)):
        damage.refused(damage.greeting[:size], damage.state)
    damage.refused(damage.greeting + b"\0", damage.state)
    damage.refused(damage.greeting * 100, damage.state)


def test_state_is_refused_at_any_other_length(damage: Damage) -> None:
    for size in range(len(damage.state)):
        damage.refused(damage.greeting, damage.state[:size])
    assert (
        damage.refused(damage.greeting, damage.state + b"more") == "4 unexpected bytes at the end"
    )


@given(st.data())
def test_flipped_bits_never_lose_a_connection(damage: Damage, data: st.DataObject) -> None:
    state = bytearray(damage.state)
    bits = st.integers(0, 8 * len(state) - 1)
    for bit in data.draw(st.sets(bits, min_size=1, max_size=8)):
        state[bit // 8] ^= 1 << bit % 8
    damage.survived(bytes(state))


def test_every_single_flipped_bit_leaves_both_connections(damage: Damage) -> None:
    for bit in range(8 * len(damage.state)):
        state = bytearray(damage.state)
        state[bit // 8] ^= 1 << bit % 8
        damage.survived(bytes(state))


@given(st.binary(max_size=200))
@example(b"")
def test_any_state_leaves_both_connections(damage: Damage, state: bytes) -> None:
    damage.survived(state)


def record(family: int = socket.AF_INET, host: bytes = b"192.0.2.1", **changed: Any) -> bytes:
    """The state of a connection, right but for what is changed."""
    fields = {
        "port": 5,
        "flags": 0,
        "lines": 3,
        "idle_for": 0.0,
        "line_open_for": 0.0,
        "lingers_for": 0.0,
        "host": len(host),
        "held": 0,
        "unsent": 0,
        "service": 0,
        "open_for": 0.0,
        "reason": 0,
        "introduction": 0,
    } | changed
    return connection_format._RECORD.pack(family, *fields.values()) + host


def refusal(
    channel: Channel,
    state: bytes,
    servers: list[socket.socket],
    size: int = 0,
    max_line: int = MAX_LINE,
) -> str:
    """The complaint about a state, of a certain size or as it is; the sockets must be left."""
    greeting = GREETING.pack(b"tcpupperd\0", connection_format.VERSION, len(servers))
    before = open_descriptors()
    send_raw(channel, greeting, state, servers, size)
    with pytest.raises(HandoverError) as caught:
        receive(channel.receive_end, max_line)
    assert len(caught.value.sockets) == len(servers)
    close(caught.value.sockets)
    assert open_descriptors() == before
    return str(caught.value)


def test_record_of_the_fixture_is_good(channel: Channel) -> None:
    ((client, server),) = tcp_pairs(1)
    state = record(service=7) + b"another"
    send_raw(channel, GREETING.pack(b"tcpupperd\0", connection_format.VERSION, 1), state, [server])
    (taken,) = receive_from(channel)
    expected = Connection(server, ("192.0.2.1", 5), State(lines=3, service="another"))
    assert state_of(taken) == state_of(expected)
    close([client, server, taken.socket])


def test_message_of_the_first_version_is_of_the_only_service_there_was(channel: Channel) -> None:
    ((client, server),) = tcp_pairs(1)
    host, held, unsent = b"192.0.2.1", b"half a li", b"ANSWER\n"
    sizes = len(host), len(held), len(unsent)
    state = struct.pack("!HHBQdddHII", socket.AF_INET, 5, 1, 3, 0, 0, 0, *sizes)
    greeting = GREETING.pack(b"tcpupperd\0", 1, 1)
    send_raw(channel, greeting, state + host + held + unsent, [server])
    (taken,) = receive_from(channel)
    assert taken.state == State(lines=3, held=held, unsent=unsent, mid_line=True)
    assert taken.state.service == "upper"
    close([client, server, taken.socket])


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"family": 60000}, "family 60000"),
        ({"family": socket.AF_INET6, "host": b"::1"}, "not the expected kind of socket"),
        ({"family": socket.AF_UNIX, "host": b""}, "not the expected kind of socket"),
        ({"lines": 2**63}, f"{2**63} lines"),
        ({"lines": 2**64 - 1}, f"{2**64 - 1} lines"),
        ({"flags": 16}, "flags 16"),
        ({"host": b"::1::"}, "illegal IP address"),
        ({"host": b"example.org"}, "illegal IP address"),
        ({"host": b"192.0.2.1\0"}, "null character"),
        ({"host": b"1" * 256}, "256"),
        ({"held": MAX_LINE + 2**16 + 1}, str(MAX_LINE + 2**16 + 1)),
        ({"unsent": 4 * MAX_LINE}, str(4 * MAX_LINE)),
        ({"service": 1}, "the state is truncated"),
        ({"reason": 1}, "the state is truncated"),
        ({"idle_for": math.nan}, "a time is out of range"),
        ({"line_open_for": math.inf}, "a time is out of range"),
        ({"lingers_for": -math.inf}, "a time is out of range"),
        ({"open_for": math.nan}, "a time is out of range"),
    ],
    ids=str,
)
def test_impossible_state_is_rejected(channel: Channel, changed: dict[str, Any], why: str) -> None:
    ((client, server),) = tcp_pairs(1)
    assert why in refusal(channel, record(**changed), [server])
    close([client, server])


@pytest.mark.parametrize(
    ("state", "size"),
    [
        (b"", 2**40),
        (record(), 2**40),
        (record(), 2**32),
        (record(held=2**30, unsent=2**31), 2**31),
        (record(held=2**31), 2**32),
        (record(held=MAX_LINE), len(record()) + MAX_LINE),
    ],
    ids=["a hole", "more", "some more", "cut short", "a line that cannot be", "one that can"],
)
def test_state_without_data_is_not_read(channel: Channel, state: bytes, size: int) -> None:
    """A sparse file can say that it has any size; to read it would take all memory there is."""
    ((client, server),) = tcp_pairs(1)
    tracemalloc.start()
    try:
        refusal(channel, state, [server], size)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**19
    close([client, server])


@pytest.mark.parametrize("max_line", [1, 2**16, 2**20])
def test_no_more_is_read_than_the_configuration_allows(channel: Channel, max_line: int) -> None:
    """Even if it has really been written."""
    held, unsent = max_line + 2**16, 2 * (max_line + 2**16) + 2**20
    pairs = tcp_pairs(1)
    for more in (0, 1):
        state = record(held=held, unsent=unsent + more, flags=connection_format._MID_LINE)
        data = state + bytes(held + unsent + more)
        send_raw(
            channel,
            GREETING.pack(b"tcpupperd\0", connection_format.VERSION, 1),
            data,
            [pairs[0][1]],
        )
        if more:
            with pytest.raises(HandoverError, match=r"too long|too many") as caught:
                receive(channel.receive_end, max_line)
            close(caught.value.sockets)
        else:
            (one,) = receive(channel.receive_end, max_line)
            assert (len(one.state.held), len(one.state.unsent)) == (held, unsent)
            one.socket.close()
    close(pairs[0])


def test_state_that_finds_no_memory_is_refused(channel: Channel) -> None:
    """Sizes that may be, but not here: the limit is of the address space of this process."""
    ((client, server),) = tcp_pairs(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    state = record(held=2**27, flags=connection_format._MID_LINE) + bytes(2**27)
    resource.setrlimit(resource.RLIMIT_AS, (used_memory() + 2**26, hard))
    try:
        complaint = refusal(channel, state, [server], max_line=2**27)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert complaint == "out of memory"
    close([client, server])


def used_memory() -> int:
    """Bytes of address space."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


LIKELY = {
    "host": st.sampled_from([b"", b"::1", b"192.0.2.1", b"fe80::1%lo"]),
    "flags": st.integers(0, 15) | st.integers(0, 255),
    "lines": st.integers(0, 9) | st.integers(2**62, 2**64 - 1),
    "idle_for": st.floats(),
    "lingers_for": st.floats(),
}


@given(st.sampled_from(connection_format._FAMILIES), st.fixed_dictionaries(LIKELY))
@example(socket.AF_INET6, {"host": b"::1", "lines": 2**63 - 1})
def test_connection_taken_over_can_be_handed_over_again(
    channel: Channel, family: socket.AddressFamily, changed: dict[str, Any]
) -> None:
    """If a message is believed, what grows out of it fits into the next one."""
    greeting = GREETING.pack(b"tcpupperd\0", connection_format.VERSION, 1)
    with socket.socket(family) as server:
        send_raw(channel, greeting, record(family, **changed), [server])
    try:
        (taken,) = receive_from(channel)
    except HandoverError as error:
        close(error.sockets)
        return
    more = taken.state._replace(lines=taken.state.lines + 10**6)
    send(channel.send_end, [taken._replace(state=more)])
    (again,) = receive_from(channel)
    assert again.state.lines == min(more.lines, 2**63 - 1)
    close([taken.socket, again.socket])


@pytest.mark.parametrize("read_end", [True, False])
def test_state_that_would_block_is_refused(channel: Channel, read_end: bool) -> None:
    """Nothing is ever read that might block."""
    ((client, server),) = tcp_pairs(1)
    pipe = os.pipe()
    files = [pipe[0] if read_end else pipe[1], server.fileno()]
    greeting = GREETING.pack(b"tcpupperd\0", connection_format.VERSION, 1)
    socket.send_fds(channel.send_end, [greeting], files)
    with pytest.raises(HandoverError, match="the state is not a file") as caught:
        receive_from(channel)
    close([client, server, *caught.value.sockets])
    for fd in pipe:
        os.close(fd)


def test_state_that_is_no_file_is_refused(channel: Channel) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    servers = [server for _, server in pairs]
    greeting, _ = capture([Connection(servers[0], ""), Connection(servers[1], "")])
    socket.send_fds(channel.send_end, [greeting], [server.fileno() for server in servers])
    with pytest.raises(HandoverError) as caught:
        receive_from(channel)
    assert len(caught.value.sockets) == len(servers)
    close(caught.value.sockets)
    for pair in pairs:
        close(pair)


def test_descriptor_that_is_no_socket_costs_only_itself(channel: Channel) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    servers = [server for _, server in pairs]
    greeting, state = capture([Connection(server, "") for server in servers])
    with open("/dev/null") as file:
        os.dup2(file.fileno(), servers[1].fileno())
    send_raw(channel, greeting, state, servers)
    with pytest.raises(HandoverError) as caught:
        receive_from(channel)
    assert len(caught.value.sockets) == 2
    close(caught.value.sockets)
    for pair in pairs:
        close(pair)


@pytest.mark.parametrize(
    "kind",
    ["an end of a channel", "a listener", "a local listener", "a datagram socket", "a fresh pair"],
)
def test_planted_descriptor_is_closed_and_the_rest_is_left(channel: Channel, kind: str) -> None:
    """It would be served as a client, shut down at its end, and handed on until then."""
    planted, family = plant(channel, kind)
    client, server = socket.socketpair()
    state = record(family, b"" if family == socket.AF_UNIX else b"192.0.2.1")
    state += record(socket.AF_UNIX, b"")
    greeting = GREETING.pack(b"tcpupperd\0", connection_format.VERSION, 2)
    before = open_descriptors()
    send_raw(channel, greeting, state, [planted, server])
    with pytest.raises(HandoverError, match="not the expected kind of socket") as caught:
        receive_from(channel)
    (left,) = caught.value.sockets
    assert is_served_by(client, left)
    left.close()
    assert open_descriptors() == before
    close([client, server, planted])


def plant(channel: Channel, kind: str) -> tuple[socket.socket, int]:
    """A descriptor of a kind, to be closed, and the family that it has."""
    if kind == "an end of a channel":
        return channel.receive_end.dup(), socket.AF_UNIX
    if kind == "a listener":
        return socket.create_server(("127.0.0.1", 0)), socket.AF_INET
    if kind == "a local listener":
        one = socket.socket(socket.AF_UNIX)
        one.bind("")
        one.listen()
        return one, socket.AF_UNIX
    if kind == "a datagram socket":
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.AF_INET
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    return ours, socket.AF_UNIX


def test_message_without_descriptors_is_refused(channel: Channel) -> None:
    channel.send_end.send(GREETING.pack(b"tcpupperd\0", connection_format.VERSION, 0))
    with pytest.raises(HandoverError) as caught:
        receive_from(channel)
    assert caught.value.sockets == []


@contextlib.contextmanager
def room_for(descriptors: int) -> Iterator[None]:
    """A limit that leaves this process room for this many more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = open_descriptors()
    free = (fd for fd in count() if fd not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, descriptors, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("room", range(4))
def test_connection_without_room_is_lost_and_the_rest_is_left(damage: Damage, room: int) -> None:
    send_raw(damage.channel, damage.greeting, damage.state, damage.servers)
    with room_for(room), contextlib.ExitStack() as stack:
        if room == 3:
            left = [connection.socket for connection in receive_from(damage.channel)]
        else:
            with pytest.raises(HandoverError) as caught:
                receive_from(damage.channel)
            left = caught.value.sockets
        for one in left:
            stack.enter_context(one)
    # The state travels first, then the sockets.
    assert len(left) == max(0, room - 1)
