"""Waiting for a condition, with a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 0.02


def until(condition: Callable[[], T], timeout: float = 30) -> T:
    """The first true value of `condition`; AssertionError after `timeout` seconds without one."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{condition} not true within {timeout} s: {value!r}"
        time.sleep(INTERVAL)
    return value
