"""A message belongs to one process, at whichever line its sender and its receiver are killed."""

import fcntl
import mmap
import os
import socket
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from integration.measures import scaled
from outlive.channel import (
    BATCH,
    Channel,
    Format,
    Owner,
    Withdrawn,
    owner,
    peek,
    receive,
    send,
)
from tcpupperd.host.in_flight import InFlight, Remainder
from unit.conftest import open_descriptors
from unit.dying import Process

FORM = Format(b"test", 1)
STATE = b"\0\0\0\3one\0\0\0\0\0\0\0\5three"
COUNT = 3

#: Where they die.
LINES = ("/outlive/channel.py", "/host/in_flight.py", "/unit/test_in_flight.py")

#: The sender and the receiver have the same table here, so what one closes must not become the
#: other's.
NOT_REUSED = 500

#: A few more lines than they come to.
LAST_LINE = {"sender": 60, "receiver": 160}


class Sending:
    """A process that sends connections, and what is left if it is killed."""

    def __init__(self, channel: Channel) -> None:
        self.sockets = [connection() for _ in range(COUNT)]
        self.all = [identity(one.fileno()) for one in self.sockets]
        self.owned: list[int] = []  # by it, or by what outlives it
        self.was_killed = False
        self.is_in_channel = False  # what it has sent, when it was killed
        self._files = [one.fileno() for one in self.sockets]
        self._channel = channel
        self._notes = InFlight()

    def start(self, line: int) -> Process:
        self._process = Process(self._run, line, LINES)
        return self._process

    def _run(self) -> None:
        end, notes = self._channel.send_end, self._notes
        send(end, FORM, self.sockets, lambda file: file.write(STATE), notes)
        os.memfd_create("another", os.MFD_ALLOW_SEALING)  # with the number of the message's state
        for fd in self._files:
            os.close(fd)
        notes.done()

    def finish(self) -> None:
        self._process.finish()
        assert not open_descriptors() & set(self._files)

    def die(self) -> None:
        """What it has sent is not its any more, and everything else still is."""
        self.was_killed = self._process.kill()
        with suppress(BlockingIOError):
            self.is_in_channel = peek(self._channel.receive_end) == COUNT
        remainder = self._notes.remainder()
        assert remainder.is_complete
        assert not remainder.received
        left = open_descriptors() & set(self._files)
        for fd in remainder.copies & left:
            os.close(fd)
        self.owned = [identity(fd) for fd in left - remainder.copies]


class Receiving:
    """A process that receives connections and lists them, and what is left if it is killed."""

    def __init__(self, channel: Channel) -> None:
        self.owned: list[int] = []
        self.was_killed = False
        self._channel = channel
        self._notes = InFlight()
        self._list = memoryview(mmap.mmap(-1, 4 * (1 + COUNT))).cast("i")

    def start(self, line: int) -> Process:
        self._before = open_descriptors()
        self._process = Process(self._run, line, LINES)
        return self._process

    def _run(self) -> None:
        try:
            message = receive(self._channel.receive_end, FORM, self._notes)
        except (BlockingIOError, Withdrawn):
            return
        assert message.read(lambda file, size, count: file.read()) == STATE
        for one in message.sockets():
            self._list[1 + self._list[0]] = one.detach()
            self._list[0] += 1
        self._notes.done()

    def finish(self) -> None:
        self._process.finish()
        self.owned = [identity(fd) for fd in self._listed()]

    def die(self) -> None:
        """What it has received is its, listed or not."""
        self.was_killed = self._process.kill()
        remainder = self._notes.remainder()
        if not remainder.is_complete:
            remainder = strangers(open_descriptors() - self._before - self._listed())
        if remainder.received:
            assert os.pread(remainder.state, 100, 0) == STATE
            assert len(remainder.received) == COUNT
        for fd in remainder.copies & open_descriptors():
            os.close(fd)
        self.owned = [identity(fd) for fd in self._listed() | set(remainder.received)]

    def _listed(self) -> set[int]:
        return set(self._list[1 : 1 + self._list[0]].tolist())


def connection() -> socket.socket:
    client, server = socket.socketpair()
    with client, server:
        return socket.socket(fileno=fcntl.fcntl(server, fcntl.F_DUPFD_CLOEXEC, NOT_REUSED))


def strangers(files: set[int]) -> Remainder:
    """What was received but not noted: the state and the connections. The other memfd that the
    sender may have opened meanwhile is empty."""
    states = [fd for fd in files if stat.S_ISREG(os.fstat(fd).st_mode) and os.fstat(fd).st_size]
    connections = tuple(sorted(fd for fd in files if stat.S_ISSOCK(os.fstat(fd).st_mode)))
    if not states:
        assert not connections
        return Remainder()
    if owner(states[0], Owner.RECEIVER) is Owner.RECEIVER:
        return Remainder(received=connections, state=states[0])
    return Remainder(copies=frozenset(connections))


def identity(fd: int) -> int:
    """The same for all descriptors of a socket."""
    return os.fstat(fd).st_ino


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """Close whatever the processes have left in the table."""
    before = open_descriptors()
    try:
        yield
    finally:
        for fd in open_descriptors() - before:
            os.close(fd)


#: The sender, then the receiver: where they stop, and whether they are killed there.
Plan = dict[str, tuple[int, bool]]

PLANS = st.fixed_dictionaries(
    {name: st.tuples(st.integers(1, last), st.booleans()) for name, last in LAST_LINE.items()}
)
IN_ORDER = ["sender", "sender", "receiver", "receiver"]


@given(plan=PLANS, turns=st.permutations(IN_ORDER))
@settings(max_examples=scaled(40, 2000))
@example(plan={"sender": (1, False), "receiver": (1, False)}, turns=IN_ORDER)
def test_each_connection_has_one_owner(channel: Channel, plan: Plan, turns: list[str]) -> None:
    """The sender and the receiver start and stop at a line, and then are killed or continue, in
    any order. What is left in the channel goes to a third process."""
    run(channel, plan, turns)


@pytest.mark.parametrize("dying", ["sender", "receiver"])
def test_death_at_any_line(channel: Channel, dying: str) -> None:
    """While the other one is not disturbed."""
    plan = {name: (last, False) for name, last in LAST_LINE.items()}
    lines = lines_until_it_lives(channel, plan, dying)
    assert LAST_LINE[dying] / 2 < lines <= LAST_LINE[dying], "to be adjusted"


def test_death_of_both(channel: Channel) -> None:
    """The sender dies around the moment of sending, and the receiver at any line after that, of
    which SOAK=1 tries all, and other runs one in four."""
    lines = [
        lines_until_it_lives(channel, {"sender": (line, True)}, "receiver", scaled(4, 1))
        for line in around_sending(channel)
    ]
    # The receiver finds no message, then one that the sender has withdrawn, then one to serve.
    assert lines[0] < lines[1] < lines[-1]


def lines_until_it_lives(channel: Channel, plan: Plan, dying: str, step: int = 1) -> int:
    """Kill one of them at each line in turn, or at one in `step`, up to the first line that it
    does not come to."""
    for line in count(1, step):
        if not run(channel, plan | {dying: (line, True)}, IN_ORDER)[dying].was_killed:
            break
    return line


def around_sending(channel: Channel) -> range:
    """The lines of the sender from the last one before its message is in the channel to the first
    one at which it has noted that."""
    first = 0
    for line in count(1):
        sending = run(channel, {"sender": (line, True)}, IN_ORDER[:2])["sender"]
        assert isinstance(sending, Sending)
        assert sending.was_killed
        if sending.is_in_channel:
            first = first or line
            if not sending.owned:
                break
    return range(first - 1, line + 1)


def run(channel: Channel, plan: Plan, turns: Sequence[str]) -> dict[str, Sending | Receiving]:
    """Carry out a plan; at the first turn of each, it starts, and at the second one, it ends."""
    with nothing_is_left(), ExitStack() as stack:
        sending = Sending(channel)
        processes: dict[str, Sending | Receiving] = {
            "sender": sending,
            "receiver": Receiving(channel),
        }
        started = set()
        for name in turns:
            line, dies = plan[name]
            if name not in started:
                stack.callback(processes[name].start(line).kill)
            elif dies:
                processes[name].die()
            else:
                processes[name].finish()
            started.add(name)
        rest = list(left_in(channel))
        owned = [
            *map(identity, rest),
            *(one for process in processes.values() for one in process.owned),
        ]
        assert Counter(owned) == Counter(sending.all)
        for one in sending.sockets:
            one.detach()
    return processes


def left_in(channel: Channel) -> Iterator[int]:
    """The connections in the messages that are left."""
    while True:
        try:
            message = receive(channel.receive_end, FORM)
        except Withdrawn:
            continue
        except BlockingIOError:
            return
        message.read(lambda file, size, count: file.read())
        yield from (one.detach() for one in message.sockets())


@pytest.mark.parametrize(
    "numbers", [(9, 0, 0), (-1, 0, 0), (1, -1, 3), (4, 10**9, -1), (2, 0, 2**31 - 1)]
)
def test_damaged_notes_are_read(numbers: tuple[int, int, int]) -> None:
    """A worker that was taken over can write anything into them."""
    notes = InFlight()
    for place, number in enumerate(numbers):
        notes._numbers[place] = number
    remainder = notes.remainder()
    assert len(remainder.copies | set(remainder.received)) <= BATCH
