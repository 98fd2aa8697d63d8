"""The owner of a message in the channel, which stays the same whichever process is killed."""

import fcntl
import os
import signal
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive import channel as channels
from outlive.channel import (
    Channel,
    Format,
    Owner,
    Withdrawn,
    owner,
)
from tcpupperd.processes.connection_format import FORMAT, Connection, send
from unit.channels import is_served_by, receive_from

FORM = Format(b"test", 1)
SEALABLE = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING


@pytest.fixture
def state(no_leak: None) -> Iterator[int]:
    """The state of a message."""
    fd = os.memfd_create("state", SEALABLE)
    yield fd
    os.close(fd)


@given(st.lists(st.sampled_from(Owner), min_size=1))
def test_the_first_to_ask_is_the_owner_for_ever(candidates: list[Owner]) -> None:
    state = os.memfd_create("state", SEALABLE)
    answers = [owner(state, candidate) for candidate in candidates]
    os.close(state)
    assert answers == [candidates[0]] * len(candidates)


def test_processes_that_ask_at_the_same_time_agree(state: int) -> None:
    """Each is killed when it has its answer, which has to be the same for those after it."""
    for _ in range(20):
        message = os.memfd_create("state", SEALABLE)
        start, begin = os.pipe()
        answers, answer = os.pipe()
        children = [asking(message, start, begin, answer, one) for one in (*Owner, *Owner)]
        os.close(begin)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert statuses == [-signal.SIGKILL] * len(children)
        os.close(answer)
        said = os.read(answers, 100)
        assert len(said) == len(children)
        assert set(said) == {owner(message, Owner.RECEIVER)} == {owner(message, Owner.SENDER)}
        for fd in (message, start, answers):
            os.close(fd)


def asking(message: int, start: int, begin: int, answer: int, candidate: Owner) -> int:
    """A process that waits for end of file, asks, writes the answer and is killed."""
    if child := os.fork():
        return child
    os.close(begin)
    os.read(start, 1)
    os.write(answer, bytes([owner(message, candidate)]))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def send_with_state(channel: Channel, sockets: list[socket.socket], form: Format = FORM) -> int:
    """Put a message without records into the channel; return its state."""
    kept: list[int] = []
    channels.send(channel.send_end, form, sockets, lambda file: kept.append(os.dup(file.fileno())))
    return kept[0]


def withdraw(state: int) -> None:
    assert owner(state, Owner.SENDER) is Owner.SENDER
    os.close(state)


def test_withdrawn_message_is_not_received_and_costs_no_connection(channel: Channel) -> None:
    client, server = socket.socketpair()
    withdraw(send_with_state(channel, [server]))
    with pytest.raises(Withdrawn):
        channels.receive(channel.receive_end, FORM)
    assert is_served_by(client, server)
    client.close()
    server.close()


def test_message_that_was_received_cannot_be_withdrawn(channel: Channel) -> None:
    client, server = socket.socketpair()
    with client, server:
        state = send_with_state(channel, [server])
        message = channels.receive(channel.receive_end, FORM)
        assert owner(state, Owner.SENDER) is Owner.RECEIVER
        message.read(lambda file, size, count: None)
        (received,) = message.sockets()
        with received:
            assert is_served_by(client, received)
        os.close(state)


def test_messages_after_a_withdrawn_one_are_received(channel: Channel) -> None:
    """A withdrawn one brings no connections to a worker."""
    client, server = socket.socketpair()
    with client, server:
        withdraw(send_with_state(channel, [server], FORMAT))
        send(channel.send_end, [Connection(server, "")])
        assert receive_from(channel) == []
        (received,) = receive_from(channel)
        with received.socket:
            assert is_served_by(client, received.socket)


@pytest.mark.parametrize("candidate", Owner)
def test_message_of_an_earlier_version_is_the_receivers(no_leak: None, candidate: Owner) -> None:
    """Nothing outlives the sender, and the memfd cannot be sealed."""
    state = os.memfd_create("state", os.MFD_CLOEXEC)
    assert owner(state, candidate) is Owner.RECEIVER
    os.close(state)


@pytest.mark.parametrize("candidate", Owner)
def test_message_without_a_memfd_is_the_receivers(no_leak: None, candidate: Owner) -> None:
    for one in socket.socketpair():
        with one:
            assert owner(one.fileno(), candidate) is Owner.RECEIVER


def test_state_of_a_message_that_has_an_owner_cannot_change_hands(state: int) -> None:
    """Not even by an attacker who has the memfd, too."""
    owner(state, Owner.RECEIVER)
    with pytest.raises(PermissionError):
        fcntl.fcntl(state, fcntl.F_ADD_SEALS, Owner.SENDER)


def test_state_can_be_sealed(channel: Channel) -> None:
    """By the process that receives it, through descriptors of its own."""
    client, server = socket.socketpair()
    send(channel.send_end, [Connection(server, "")])
    _, files, *_ = socket.recv_fds(channel.receive_end, 100, 2)
    assert fcntl.fcntl(files[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL == 0
    for fd in (*files, client.detach(), server.detach()):
        os.close(fd)
