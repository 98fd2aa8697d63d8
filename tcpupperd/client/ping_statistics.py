"""The counts and times of a ping, and its summary."""

from __future__ import annotations

import math

TIMES = ("min", "avg", "max", "p99")

WIDTH = 0.01  # width of a bucket of `Times`, as a fraction of the time


class Times:
    """Times in seconds. Memory does not grow with their number: for the percentile, they are
    counted in buckets, each 1 % wider than the one before."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.least = math.inf
        self.most = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        self.least = min(self.least, seconds)
        self.most = max(self.most, seconds)
        bucket = math.ceil(math.log(max(seconds, 1e-9)) / WIDTH)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    @property
    def mean(self) -> float:
        return self.total / self.count

    def percentile(self, share: float) -> float:
        """The time that a ``share`` of all times do not exceed, at most 1 % too high."""
        left = share * self.count
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return min(math.exp(bucket * WIDTH), self.most)
        return self.most


class PingStatistics:
    """The counts of all connections of a ping."""

    def __init__(self) -> None:
        self.sent = 0
        self.answered = 0
        self.lost = 0  # lines without a correct answer
        self.wrong = 0  # answers
        self.disconnected = 0  # connections that ended before the ping did
        self.reconnected = 0
        self.longest_gap = 0.0
        self.times = Times()

    @property
    def outstanding(self) -> int:
        """Lines that may still be answered."""
        return self.sent - self.answered - self.lost

    @property
    def is_perfect(self) -> bool:
        """Whether every line was answered, nothing else was sent, and every connection lasted."""
        return self.is_complete and not self.disconnected

    @property
    def is_complete(self) -> bool:
        """Whether every line was answered, and nothing else was sent."""
        return not self.lost and not self.wrong and self.answered == self.sent > 0

    def add_answer(self, seconds: float) -> None:
        self.answered += 1
        self.times.add(seconds)

    def add_gap(self, seconds: float) -> None:
        """Record a time for which a connection waited for an answer."""
        self.longest_gap = max(self.longest_gap, seconds)

    @property
    def loss(self) -> float:
        """The percentage of the lines that were lost."""
        return 100 * self.lost / max(1, self.sent)

    def summary(self) -> str:
        """One line of counts and, if there was an answer, the longest gap and a line of times."""
        counts = (
            f"{self.sent} sent, {self.answered} answered, {self.lost} lost ({self.loss:.3g} %),"
            f" {self.wrong} wrong, {self.disconnected} disconnected,"
            f" {self.reconnected} reconnected"
        )
        if not self.answered:
            return counts + "\n"
        times = "/".join(map(milliseconds, self._times().values()))
        gap = duration(self.longest_gap)
        return f"{counts}, longest gap {gap}\ntime min/avg/max/p99 = {times} ms\n"

    def as_json(self) -> str:
        """The same as a line of JSON; times are in seconds, and null without an answer."""
        import json  # needed only here

        names = ("sent", "answered", "lost", "wrong", "disconnected", "reconnected")
        times = {"longest_gap": self.longest_gap, **self._times()} if self.answered else {}
        counts = {name: getattr(self, name) for name in names}
        shown = {name: times.get(name) for name in ("longest_gap", *TIMES)}
        return json.dumps(counts | {"loss_percent": self.loss} | shown) + "\n"

    def _times(self) -> dict[str, float]:
        """By the names in `TIMES`, in seconds."""
        times = self.times
        four = (times.least, times.mean, times.most, times.percentile(0.99))
        return dict(zip(TIMES, four, strict=True))


def milliseconds(seconds: float) -> str:
    """A time in milliseconds with about three significant digits, in the format of ping(8)."""
    number = 1000 * seconds
    digits = 3 - sum(number >= limit for limit in (1, 10, 100))
    return f"{number:.{digits}f}"


def duration(seconds: float) -> str:
    """A time in a suitable unit: "0.210 ms", "1.02 s"."""
    return f"{milliseconds(seconds)} ms" if seconds < 1 else f"{seconds:.2f} s"
