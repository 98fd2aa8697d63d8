"""Waiting for a condition, with a bound."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds that bound every wait. None is expected to take that long, even where twenty processes
#: share one slow processor.
DEADLINE = 120.0

#: Seconds between two checks of a condition.
INTERVAL = 0.005


def until(condition: Callable[[], T | None], timeout: float = DEADLINE) -> T:
    """The first true value of `condition`; AssertionError after `timeout` seconds without one."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{condition} still {value!r} after {timeout} s"
        time.sleep(INTERVAL)  # the one place where tests wait for what nothing announces
    return value
