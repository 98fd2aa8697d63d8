"""Timers, and the loop iteration to which they belong."""

import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpupperd.serving.poller import Poller
from tcpupperd.serving.timers import Timer, Timers

times = st.floats(0, 100) | st.just(math.inf)


@given(st.lists(st.tuples(st.integers(0, 5), times)), times)
def test_each_is_called_once_at_the_time_that_was_set_last(
    settings: list[tuple[int, float]], now: float
) -> None:
    timers, called = Timers(), list[int]()
    mine = [Timer(timers, lambda number=number: called.append(number)) for number in range(6)]  # type: ignore[misc]
    for number, when in settings:
        mine[number].set(when)
    last = dict(settings)
    assert timers.next == min(last.values(), default=math.inf)
    due = {number for number, when in last.items() if when <= now and when < math.inf}
    timers.run_due(now)
    assert called == sorted(due, key=lambda number: (last[number], called.index(number)))
    assert {number for number in last if mine[number].pending} == {
        number for number, when in last.items() if number not in due and when < math.inf
    }
    timers.run_due(now)
    assert len(called) == len(due)


def test_what_is_set_for_now_waits_for_the_next_time() -> None:
    timers, called = Timers(), list[None]()

    def again() -> None:
        called.append(None)
        timer.set(5.0)

    timer = Timer(timers, again)
    timer.set(1.0)
    for count in (1, 2, 3):
        timers.run_due(5.0)
        assert len(called) == count


def test_one_may_cancel_or_postpone_another_that_is_due() -> None:
    timers, called = Timers(), list[str]()

    def first() -> None:
        cancelled.cancel()
        postponed.set(9.0)

    early = Timer(timers, first)
    cancelled = Timer(timers, lambda: called.append("cancelled"))
    postponed = Timer(timers, lambda: called.append("postponed"))
    for timer, when in ((postponed, 3.0), (cancelled, 2.0), (early, 1.0)):
        timer.set(when)
    timers.run_due(5.0)
    assert not called
    timers.run_due(9.0)
    assert called == ["postponed"]


def test_an_exception_leaves_the_others_due() -> None:
    timers, called = Timers(), list[None]()
    failing = Timer(timers, lambda: 1 / 0)
    after = Timer(timers, lambda: called.append(None))
    failing.set(1.0)
    after.set(2.0)
    with pytest.raises(ZeroDivisionError):
        timers.run_due(5.0)
    assert timers.next == 2.0
    timers.run_due(5.0)
    assert called == [None]


@pytest.fixture
def poller() -> Iterator[Poller]:
    poller = Poller()
    yield poller
    poller.close()


def test_a_time_that_never_comes_does_not_end_the_wait(poller: Poller) -> None:
    assert not poller.at(math.inf).pending
    assert poller.timeout() is None


def test_distant_times_that_are_changed_leave_nothing_behind(poller: Poller) -> None:
    timer = poller.at(math.inf)
    for seconds in range(1000):
        timer.set(poller.now + 1000 + seconds)
    timer.cancel()
    assert poller.timeout() is None


def test_due_calls_come_before_those_of_each_iteration(poller: Poller) -> None:
    called: list[str] = []
    poller.each.append(lambda: called.append("each"))
    poller.at(poller.now, lambda: called.append("due"))
    assert poller.wait() == []
    poller.finish()
    poller.finish()
    assert called == ["due", "each", "each"]


def test_a_call_of_each_iteration_may_remove_itself(poller: Poller) -> None:
    called: list[str] = []

    def once() -> None:
        called.append("once")
        poller.each.remove(once)

    poller.each += [once, lambda: called.append("always")]
    poller.finish()
    poller.finish()
    assert called == ["once", "always", "always"]
