"""Backoff: delays between attempts to start a worker, each longer than the one before."""

from __future__ import annotations

from time import monotonic

#: Delays, in seconds, before the next attempt after a worker died without serving a client: the
#: first and the longest. Each delay is twice the previous one.
FIRST, LAST = 0.1, 10.0


class Backoff:
    """When the next attempt may be made."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Allow an attempt immediately."""
        self.failures = 0  # in a row
        self.retry_at = 0.0

    def fail(self) -> None:
        """Delay the next attempt."""
        self.retry_at = monotonic() + min(LAST, FIRST * 2**self.failures)
        self.failures = min(self.failures + 1, 30)
