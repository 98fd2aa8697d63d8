"""Warnings that clients can cause."""

import logging
import time

import pytest

from tcpupperd.host.messages import RateLimitedLog


def test_first_is_logged_and_more_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    warnings = RateLimitedLog(logging.getLogger(__name__))
    for number in range(100):
        warnings.warn("%s is refused", number)
    assert caplog.messages == ["0 is refused"]


def test_number_left_out_is_told_with_the_next(caplog: pytest.LogCaptureFixture) -> None:
    warnings = RateLimitedLog(logging.getLogger(__name__))
    warnings.INTERVAL = 0.2
    began, left_out = time.monotonic(), -1
    while len(caplog.messages) < 2:
        warnings.warn("100 %% of %s are refused", "them")
        left_out += 1
    assert time.monotonic() - began >= 0.2
    assert caplog.messages[1] == (
        f"100 % of them are refused; {left_out - 1} similar messages suppressed"
    )
