"""Deadlines: never early, at most a tick late, gone when discarded."""

import math

from hypothesis import given
from hypothesis import strategies as st

from tcpupperd.serving.deadlines import Deadlines

TICK = Deadlines.TICK
times = st.floats(0, 100)


def take_all_due(deadlines: Deadlines, now: float) -> set[int]:
    """All that is due, as the server takes it: tick by tick."""
    found: set[int] = set()
    while due := deadlines.pop_due(now):
        assert not due & found
        found |= due
    return found


def test_nothing_held_is_never_due() -> None:
    deadlines = Deadlines()
    assert deadlines.next_tick() == math.inf
    assert deadlines.pop_due(1e9) == set()


@given(st.dictionaries(st.integers(0, 50), times), st.lists(times).map(sorted))
def test_each_is_due_once_at_the_first_tick_after_its_time(
    held: dict[int, float], moments: list[float]
) -> None:
    deadlines = Deadlines()
    for fd, when in held.items():
        deadlines.add(fd, when)
    waiting = dict(held)
    for now in moments:
        due = take_all_due(deadlines, now)
        assert due <= waiting.keys()
        assert all(waiting.pop(fd) <= now for fd in due)
        assert all(when + TICK > now for when in waiting.values())
        assert deadlines.next_tick() > now


@given(st.dictionaries(st.integers(0, 50), times), st.sets(st.integers(0, 50)))
def test_discarded_descriptor_is_never_due(held: dict[int, float], discarded: set[int]) -> None:
    deadlines = Deadlines()
    buckets = {fd: deadlines.add(fd, when) for fd, when in held.items()}
    for fd in discarded & held.keys():
        buckets[fd].discard(fd)
    left = held.keys() - discarded
    earliest = min((held[fd] for fd in left), default=math.inf)
    assert earliest <= deadlines.next_tick() <= earliest + TICK
    assert take_all_due(deadlines, 1000) == left


def test_discarding_an_absent_descriptor_does_nothing() -> None:
    deadlines = Deadlines()
    bucket = deadlines.add(5, 1.0)
    due = deadlines.pop_due(2.0)
    bucket.discard(5)
    assert due == {5}
    assert deadlines.next_tick() == math.inf


def test_a_tick_that_was_emptied_can_be_used_again() -> None:
    deadlines = Deadlines()
    deadlines.add(5, 1.0).discard(5)
    deadlines.add(6, 1.0)
    assert take_all_due(deadlines, 1.0) == {6}


def test_many_connections_wake_the_server_once_a_tick() -> None:
    deadlines = Deadlines()
    for fd in range(10000):
        deadlines.add(fd, 10 + fd / 10000)
    moments = set()
    while deadlines.next_tick() < math.inf:
        moments.add(deadlines.next_tick())
        deadlines.pop_due(deadlines.next_tick())
    assert len(moments) <= 1 / TICK + 1


def test_only_some_of_many_are_due_in_one_loop_iteration() -> None:
    deadlines = Deadlines()
    buckets = [deadlines.add(fd, 1.0) for fd in range(1000)]
    found: set[int] = set()
    while due := deadlines.pop_due(1.0):
        assert len(due) <= Deadlines.AT_MOST
        assert not due & found
        found |= due
    assert found == set(range(1000))
    assert not any(buckets)


@given(times)
def test_time_that_a_client_measures_is_exact(when: float) -> None:
    deadlines = Deadlines()
    deadlines.add(5, when, Deadlines.FINE_TICK)
    assert when <= deadlines.next_tick() < when + 0.01
