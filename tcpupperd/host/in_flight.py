"""Notes about the message that a process is sending or receiving, which survive its death.

They are in memory that the process shares with another one, which also shares its descriptors:
clone(2) with CLONE_FILES. If the process is killed, `remainder` tells the other one which of these
descriptors are connections of an interrupted handover, and who owns them. At any instruction, the
notes are either right or say that something is unknown: each step ends with a single store.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from outlive.channel import BATCH, Notes, Owner, owner


class Phase(IntEnum):
    """How far the handover of a message has got."""

    IDLE = 0
    SENDING = 1  # the message may be in the channel or not
    SENT = 2  # another process owns it, and what is left of its connections here are copies
    RECEIVING = 3  # a message may have been received whose descriptors are not noted yet
    RECEIVED = 4  # its connections are in no other list yet


class Remainder(NamedTuple):
    """What a process that was killed has left of a handover."""

    copies: frozenset[int] = frozenset()
    """Connections that another process owns: to be closed, and nothing else."""

    received: tuple[int, ...] = ()
    """Connections in a message that is ours, in its order: to be served as `state` says."""

    state: int = -1
    """The state of that message."""

    is_complete: bool = True
    """False if there may be connections in a received message that are unknown: any stream socket,
    and the state of that message, about which the process had no other notes."""


_PHASE, _STATE, _COUNT, _FIRST = 0, 1, 2, 3
_SIZE = (_FIRST + BATCH) * 4


class InFlight(Notes):
    """The notes; to be created before the processes part."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, _SIZE)).cast("i")
        self._kept = -1  # a state that is closed only once its connections are noted elsewhere

    def sending(self, state: int, connections: Sequence[int]) -> None:
        self._note(Phase.SENDING, state, connections)

    def sent(self) -> None:
        self._numbers[_PHASE] = Phase.SENT

    def receiving(self) -> None:
        self._numbers[_PHASE] = Phase.RECEIVING

    def received(self, state: int, connections: Sequence[int]) -> None:
        self._note(Phase.RECEIVED, state, connections)

    def withdrawn(self) -> None:
        self._numbers[_PHASE] = Phase.SENT

    def close_state(self, state: int) -> None:
        self._kept = state

    def done(self) -> None:
        self._numbers[_PHASE] = Phase.IDLE
        if self._kept >= 0:
            os.close(self._kept)
            self._kept = -1

    def _note(self, phase: Phase, state: int, connections: Sequence[int]) -> None:
        numbers = self._numbers
        numbers[_STATE], numbers[_COUNT] = state, len(connections)
        for place, fd in enumerate(connections, _FIRST):
            numbers[place] = fd
        numbers[_PHASE] = phase

    def remainder(self) -> Remainder:
        """What the process that wrote the notes has left. It must be dead: the answer decides who
        owns the message. Nothing in the notes is trusted."""
        phase, *numbers = (max(0, number) for number in self._numbers)
        state, count, *files = numbers
        connections = tuple(files[:count])
        match phase:
            case Phase.SENDING if owner(state, Owner.SENDER) is Owner.SENDER:
                return Remainder()
            case Phase.RECEIVED if owner(state, Owner.RECEIVER) is Owner.RECEIVER:
                return Remainder(received=connections, state=state)
            case Phase.SENDING | Phase.SENT | Phase.RECEIVED:
                return Remainder(copies=frozenset(connections))
            case Phase.RECEIVING:
                return Remainder(is_complete=False)
        return Remainder()
