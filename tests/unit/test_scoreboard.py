"""Counters that processes share."""

import ctypes
import faulthandler
import math
import mmap
import os
import resource
import signal
from collections.abc import Callable
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpupperd.processes.scoreboard import BELIEVED, Scoreboard, Slot
from tcpupperd.serving.counters import (
    ACCEPTED,
    ACCEPTED_FROM,
    ACCEPTING,
    BEGAN,
    EARLIER_LINES,
    EXITING,
    HEARTBEAT,
    LINES,
    LISTENERS,
    LONGEST_ITERATION,
    LOOP_ITERATIONS,
    LOOP_MICROSECONDS,
    MOST_TOGETHER,
    NUMBERS,
    OPEN,
    PID,
    RESTARTS,
    STARTED,
    STARTING,
    STATE,
    WORKER,
    WORKER_DIED,
    Tally,
)
from tcpupperd.serving.fast_path import ANSWERED
from tcpupperd.serving.report import STATES, report_of_worker


def test_new_slot_has_a_number_for_each_field_and_only_the_time_is_set() -> None:
    before = monotonic()
    numbers = list(Scoreboard(1).claim().numbers)
    assert before - 0.001 <= numbers[STARTED] / 1_000_000 <= monotonic()
    assert numbers[HEARTBEAT] == numbers[STARTED]
    numbers[STARTED] = numbers[HEARTBEAT] = 0
    assert numbers == [0] * NUMBERS


def test_slots_do_not_overlap() -> None:
    board = Scoreboard(3)
    slots = [board.claim() for _ in range(3)]
    for value, slot in enumerate(slots, 1):
        for field in range(NUMBERS):
            slot.numbers[field] = value
    assert [set(slot.numbers) for slot in slots] == [{1}, {2}, {3}]
    assert len({slot.row for slot in slots}) == 3


def test_there_are_no_more_slots_than_said() -> None:
    board = Scoreboard(2)
    board.claim()
    second = board.claim()
    with pytest.raises(OSError, match="all slots of the scoreboard are in use"):
        board.claim()
    board.release(second)
    assert board.claim().row == second.row


def test_released_slot_has_no_worker_any_more() -> None:
    board = Scoreboard(1)
    slot = board.claim()
    slot.numbers[STATE] = ACCEPTING
    slot.numbers[PID], slot.numbers[OPEN] = 1, 7
    assert (len(board.workers()), board.loads(), board.open()) == (1, [7], 7)
    board.release(slot)
    assert (board.workers(), board.loads(), board.open()) == ([], [], 0)
    assert board.claim().numbers[STATE] == STARTING


def test_worker_continues_counting_where_the_previous_one_stopped() -> None:
    board = Scoreboard(1)
    first = board.claim()
    Tally(first.numbers).add(ACCEPTED, 5)
    Tally(first.numbers).add(LINES, 9)
    board.release(first)
    second = board.claim()
    assert (second.connections, second.numbers[EARLIER_LINES]) == (0, 9)
    tally = Tally(second.numbers)
    tally.counts[ANSWERED] += 1
    tally.add(ACCEPTED)
    tally.publish(1, 0.5)
    assert (second.connections, board.totals()["lines"], board.totals()["accepted"]) == (1, 10, 6)


def test_peak_is_of_all_workers_together_and_outlives_them() -> None:
    board = Scoreboard(2)
    slots = [board.claim() for _ in range(2)]
    tallies = [Tally(slot.numbers) for slot in slots]
    for tally in tallies:
        tally.open_together = lambda: sum(board.loads())
    for first, second in ((4, 0), (3, 5), (3, 2), (4, 2)):
        tallies[0].publish(first, 0.0)
        tallies[1].publish(second, 0.0)
    assert (board.open(), board.peak()) == (6, 8)
    slots[1].numbers[STATE] = EXITING  # and hands its connections over to the other one
    tallies[0].publish(6, 0.0)
    assert board.peak() == 8
    for slot in slots:
        board.release(slot)
    assert (board.open(), board.peak()) == (0, 8)


def test_peak_of_a_worker_is_not_believed_without_limit() -> None:
    board = Scoreboard(1)
    slot = board.claim()
    slot.numbers[MOST_TOGETHER] = 2**64 - 1
    board.release(slot)
    assert board.peak() == BELIEVED


def test_connections_accepted_from_a_listener_are_those_of_all_workers() -> None:
    board = Scoreboard(2)
    for count in (3, 4):
        slot = board.claim()
        slot.numbers[ACCEPTED_FROM + 5] = count
        slot.numbers[ACCEPTED_FROM + LISTENERS - 1] = count
    board.release(slot)
    found = [board.accepted_from(number) for number in (0, 5, LISTENERS - 1, LISTENERS)]
    assert found == [0, 7, None, None]


def test_longest_iteration_is_that_of_the_worker_and_the_time_is_that_of_all() -> None:
    board = Scoreboard(1)
    slot = board.claim()
    tally = Tally(slot.numbers)
    for seconds in (0.25, 0.5, 0.125, 0.0001, 0.0):
        tally.publish(0, seconds)
    assert (slot.numbers[LONGEST_ITERATION], slot.numbers[LOOP_ITERATIONS]) == (500_000, 5)
    assert slot.numbers[LOOP_MICROSECONDS] == 875_000  # the rest is not yet worth writing
    tally.publish(0, 0.001)
    assert slot.numbers[LOOP_MICROSECONDS] == 876_100
    board.release(slot)
    slot = board.claim()
    assert slot.numbers[LONGEST_ITERATION] == 0
    Tally(slot.numbers).publish(0, 0.25)
    assert slot.numbers[LONGEST_ITERATION] == 250_000
    assert (board.totals()["loop_iterations"], board.totals()["loop_microseconds"]) == (
        7,
        1_126_100,
    )


def test_total_never_counts_twice_or_falls_while_a_worker_is_replaced() -> None:
    board = Scoreboard(2)
    slot = board.claim()
    slot.numbers[LINES] = 5
    reader = os.fork()
    if not reader:
        while board.totals()["lines"] == 5 and board.daemon[BEGAN] != 1:
            pass
        os._exit(board.totals()["lines"] != 5)
    for _ in range(2000):
        board.release(slot)
        slot = board.claim()
    board.put(BEGAN, 1)  # the sign to end
    assert os.waitpid(reader, 0)[1] == 0


def test_totals_outlive_the_worker_but_its_connections_do_not() -> None:
    board = Scoreboard(2)
    gone, live = board.claim(), board.claim()
    for slot in (gone, live):
        slot.numbers[LINES] = 5
        slot.numbers[OPEN] = 3
    board.release(gone)
    assert board.totals()["lines"] == 10
    assert board.totals()["open"] == 3
    assert list(board.totals()) == WORKER.names[OPEN:]


def test_parent_reads_the_counts_of_a_child() -> None:
    board = Scoreboard(1)
    slot = board.claim()
    pid = os.fork()
    if not pid:
        slot.numbers[LINES] = 2**63 + 1
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert board.totals()["lines"] == 2**63 + 1


def board_of(loads: list[int]) -> tuple[Scoreboard, list[Slot]]:
    """A scoreboard of workers of one generation that have so many connections."""
    board = Scoreboard(len(loads) + 1)
    slots = [board.claim(7) for _ in loads]
    for slot, load in zip(slots, loads, strict=True):
        slot.numbers[OPEN] = load
    return board, slots


def test_excess_is_unknown_while_connections_change_hands() -> None:
    board, slots = board_of([3, 12, 15])
    assert board.excess(7, 10) == 2 + 5
    assert board.excess(8, 10) == math.inf
    other = board.claim(6)
    assert board.excess(7, 10) == math.inf
    board.release(other)
    slots[0].numbers[STATE] = EXITING
    assert board.excess(7, 10) == math.inf
    board.release(slots[0])
    assert board.excess(7, 10) == 2 + 5


@given(st.data(), st.integers(1, 8), st.integers(1, 50))
def test_workers_that_leave_the_excess_to_others_never_have_more_than_all_shares(
    data: st.DataObject, workers: int, share: int
) -> None:
    """However uneven what they took over is, and in whatever order they accept, close and look:
    each accepts up to what it was last allowed, and knows nothing else of the others."""
    loads, left = [], workers * share
    for _ in range(workers):
        loads.append(data.draw(st.integers(0, left)))
        left -= loads[-1]
    board, slots = board_of(loads)
    allowed = [-math.inf] * workers
    for one in data.draw(st.lists(st.integers(0, workers - 1), max_size=40)):
        numbers = slots[one].numbers
        if data.draw(st.booleans()):
            allowed[one] = max(allowed[one], share - board.excess(7, share))
        if data.draw(st.booleans()):
            numbers[OPEN] = data.draw(st.integers(0, numbers[OPEN]))
        numbers[OPEN] = int(max(numbers[OPEN], allowed[one]))
        assert board.open() <= workers * share


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


def in_a_child(board: Scoreboard, action: Callable[[], object]) -> int:
    """How a worker that does this ends: 0, or what ended it."""
    board.claim()
    pid = os.fork()
    if not pid:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_worker_can_read_but_not_write_the_counts_of_the_supervisor() -> None:
    others = mapped_to_be_read()
    board = Scoreboard(9)
    [readable] = mapped_to_be_read() - others
    board.put(RESTARTS, 7)
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    address = ctypes.c_char.from_buffer(board._ours)  # of what only the supervisor has

    def make_writable() -> None:
        assert libc.mprotect(ctypes.c_void_p(readable), page, mmap.PROT_READ | mmap.PROT_WRITE)

    def write() -> None:
        board.daemon[RESTARTS] = 2**64 - 1

    def write_where_the_supervisor_does() -> None:
        faulthandler.disable()
        ctypes.memset(ctypes.addressof(address), 0xFF, page)

    assert in_a_child(board, lambda: os._exit(board.daemon[RESTARTS])) == 7
    assert in_a_child(board, make_writable) == 0  # it fails
    assert in_a_child(board, write) == 1
    assert in_a_child(board, write_where_the_supervisor_does) == -signal.SIGSEGV
    board.count(RESTARTS)
    assert in_a_child(board, lambda: os._exit(board.daemon[RESTARTS])) == 8


def mapped_to_be_read() -> set[int]:
    """The addresses of mappings that only exist to be read."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split() for line in maps if "memfd:outlive" in line]
    return {int(where.split("-")[0], 16) for where, rights, *_ in ranges if rights == "r--s"}


def test_no_claim_of_a_worker_is_counted_as_it_is() -> None:
    board = Scoreboard(1)
    slot = board.claim()
    for field in range(len(WORKER.rows)):
        slot.numbers[field] = 2**64 - 1
    for _ in range(3):
        board.count(WORKER_DIED, slot.numbers[OPEN])
    assert board.events()["worker_died"] == 3 * BELIEVED
    assert board.totals()["lines"] == 2**64 - 1
    assert report_of_worker(board.workers()[0], 0, leaving=False).state in STATES
    board.release(slot)
    assert board.claim().connections == 0


def test_scoreboard_without_files_counts_as_well() -> None:
    """With LimitFSIZE=0 there is no file that could be mapped."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        board = Scoreboard(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    board.put(RESTARTS, 7)
    assert in_a_child(board, lambda: os._exit(board.daemon[RESTARTS])) == 7
