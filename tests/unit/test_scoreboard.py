"""Counters that processes share."""

import os

import pytest

from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.serving.counters import ACCEPTING, FIELDS, HEARTBEAT, LINES, OPEN, STATE


def test_new_slot_is_all_zero_and_has_a_number_for_each_field() -> None:
    assert list(Scoreboard(1).claim().numbers) == [0] * len(FIELDS)


def test_slots_do_not_overlap() -> None:
    board = Scoreboard(3)
    slots = [board.claim() for _ in range(3)]
    for value, slot in enumerate(slots, 1):
        for field in range(len(FIELDS)):
            slot.numbers[field] = value
    assert [set(slot.numbers) for slot in slots] == [{1}, {2}, {3}]
    assert len({slot.position for slot in slots}) == 3


def test_there_are_no_more_slots_than_said() -> None:
    board = Scoreboard(2)
    board.claim()
    second = board.claim()
    with pytest.raises(IndexError):
        board.claim()
    board.release(second)
    assert board.claim().position == second.position


def test_released_slot_is_clean_for_the_next() -> None:
    board = Scoreboard(1)
    slot = board.claim()
    slot.numbers[STATE] = ACCEPTING
    slot.numbers[HEARTBEAT] = 2**64 - 1
    board.release(slot)
    assert list(board.claim().numbers) == [0] * len(FIELDS)


def test_totals_outlive_the_worker_but_its_connections_do_not() -> None:
    board = Scoreboard(2)
    gone, live = board.claim(), board.claim()
    for slot in (gone, live):
        slot.numbers[LINES] = 5
        slot.numbers[OPEN] = 3
    board.release(gone)
    assert board.totals()["lines"] == 10
    assert board.totals()["open"] == 3
    assert board.totals().keys() == set(FIELDS) - {"state", "heartbeat"}


def test_what_a_child_counts_its_parent_reads() -> None:
    board = Scoreboard(1)
    slot = board.claim()
    pid = os.fork()
    if not pid:
        slot.numbers[LINES] = 2**63 + 1
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert board.totals()["lines"] == 2**63 + 1


class Busy(Scoreboard):
    """A worker is started before each column is read."""

    def _column(self, *which: int) -> list[int]:
        self.claim()
        return super()._column(*which)


def test_loads_can_be_read_while_a_worker_is_started() -> None:
    board = Busy(4)
    slot = board.claim()
    slot.numbers[HEARTBEAT], slot.numbers[OPEN] = 1, 7
    assert board.loads() == [7]
