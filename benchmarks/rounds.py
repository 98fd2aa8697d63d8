"""Runs the same works on all servers in rounds, so that a ratio compares the same moment."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from statistics import median

from benchmarks.load import Outcome, Work, measure
from benchmarks.servers import Running, Server, started


class Rounds:
    """The outcomes by server and work, one for each round."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[Server, Work], dict[int, Outcome]] = defaultdict(dict)
        self.failures: list[str] = []

    def run(
        self, servers: Sequence[Server], works: Sequence[Work], rounds: int, seconds: float
    ) -> None:
        """Run the rounds. All servers of a round run at the same time, but only one has work; the
        others wait, which costs nothing."""
        for number in range(rounds):
            with ExitStack() as stack:
                running = [stack.enter_context(started(server)) for server in servers]
                for work in works:
                    print(f"round {number + 1} of {rounds}: {work.title}", flush=True)
                    for one in running:
                        if not one.server.one_shot or "--churn" in work.options:
                            self._measure(number, one, work, seconds)

    def _measure(self, number: int, running: Running, work: Work, seconds: float) -> None:
        server = running.server
        try:
            outcome = measure(running, work, seconds)
        except RuntimeError as error:
            self.failures.append(f"{work.title}: {error}")
            print(f"  {server.name:24} FAILED: {error}", flush=True)
            return
        self.outcomes[server, work][number] = outcome
        print(
            f"  {server.name:24}{outcome.rate:14,.0f} {work.unit}/s"
            f"{outcome.cpu_us:10.3f} us CPU each, p99 {outcome.p99_us:,.0f} us",
            flush=True,
        )

    def as_json(self) -> str:
        """All outcomes, for programs: a list for each server and work, in the order of rounds."""
        rows = [
            {"server": server.name, "work": work.title, "rounds": [asdict(r) for r in of.values()]}
            for (server, work), of in self.outcomes.items()
        ]
        return json.dumps(rows, indent=1) + "\n"

    def median(self, server: Server, work: Work, figure: str) -> float:
        values: list[float] = [
            getattr(one, figure) for one in self.outcomes[server, work].values()
        ]
        return median(values)

    def ratios(
        self, server: Server, base: Server, work: Work, figure: str = "rate"
    ) -> list[float]:
        """The ratio of ``server`` to ``base`` in each round that has both."""
        above, below = self.outcomes[server, work], self.outcomes[base, work]
        return [
            getattr(above[number], figure) / getattr(below[number], figure)
            for number in above.keys() & below.keys()
        ]


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median, and minimum to maximum: ``0.84 (0.81..0.86)``."""
    values = list(values)
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"
