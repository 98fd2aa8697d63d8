"""What was measured: ``results/results.json``, from which everything else is written."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load import Outcome

FILE = Path(__file__).parent / "results" / "results.json"

#: What was measured, the value, and the target if there is one.
Row = tuple[str, str, str]


@dataclass
class Results:
    conditions: dict[str, str] = field(default_factory=dict)
    outcomes: dict[tuple[str, str], dict[int, Outcome]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    """By server and workload: one for each round in which both took part."""
    memory: dict[str, float] = field(default_factory=dict)
    """Bytes for an idle connection, by server."""
    measures: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def servers(self) -> list[str]:
        return list(dict.fromkeys(server for server, _ in self.outcomes))

    def add(self, server: str, work: str, number: int, outcome: Outcome) -> None:
        self.outcomes[server, work][number] = outcome

    def of(self, server: str, work: str) -> dict[int, Outcome]:
        return self.outcomes.get((server, work), {})

    def median(self, server: str, work: str, figure: str) -> float:
        values: list[float] = [getattr(one, figure) for one in self.of(server, work).values()]
        return median(values)

    def ratios(self, server: str, base: str, work: str, figure: str = "rate") -> list[float]:
        """The ratio of ``server`` to ``base`` in each round that has both."""
        above, below = self.of(server, work), self.of(base, work)
        return [
            getattr(above[number], figure) / getattr(below[number], figure)
            for number in sorted(above.keys() & below.keys())
        ]

    def as_json(self) -> str:
        rows = [
            {
                "server": server,
                "work": work,
                "rounds": {str(number): _rounded(one) for number, one in of.items()},
            }
            for (server, work), of in self.outcomes.items()
        ]
        content = {
            "conditions": self.conditions,
            "outcomes": rows,
            "memory": self.memory,
            "measures": self.measures,
            "failures": self.failures,
        }
        return _in_lines(content)

    @classmethod
    def read(cls, text: str) -> "Results":
        content: dict[str, Any] = json.loads(text)
        results = cls(
            conditions=content["conditions"],
            memory=content["memory"],
            measures=[tuple(row) for row in content["measures"]],
            failures=content["failures"],
        )
        for row in content["outcomes"]:
            for number, figures in row["rounds"].items():
                results.add(row["server"], row["work"], int(number), Outcome(**figures))
        return results


def _rounded(outcome: Outcome) -> dict[str, float]:
    """Without digits that mean nothing."""
    return {name: float(f"{value:.5g}") for name, value in asdict(outcome).items()}


def _in_lines(content: dict[str, Any]) -> str:
    """JSON with a line for each item, so that a change shows what has changed."""
    parts = []
    for name, value in content.items():
        pairs = value.items() if isinstance(value, dict) else [("", one) for one in value]
        items = [(f"{json.dumps(key)}: " if key else "") + json.dumps(one) for key, one in pairs]
        begin, end = "{}" if isinstance(value, dict) else "[]"
        parts.append(f"{json.dumps(name)}: {begin}\n" + ",\n".join(items) + f"\n{end}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median, and minimum to maximum: ``0.84 (0.81..0.86)``."""
    values = list(values)
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"
