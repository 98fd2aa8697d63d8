"""The status line, of which the service manager reads only so much."""

from __future__ import annotations

import pytest

from tcpupperd.processes.status_line import LENGTH_MAX, status_line

PROBLEM = "the last reload failed; see the log"


def test_facts_and_problems_are_joined() -> None:
    assert status_line(["Listening", "2 workers"], [PROBLEM]) == f"Listening; 2 workers; {PROBLEM}"


@pytest.mark.parametrize("name", ["address", "ä", "\N{SNOWMAN}"])
@pytest.mark.parametrize("count", [1, 400, 1000, 3000, 10_000])
def test_the_longest_fact_is_shortened_and_never_a_problem(name: str, count: int) -> None:
    listening = "Listening on " + ", ".join([name] * count)
    line = status_line([listening, "2 workers, 3 connections"], [PROBLEM, "other"])
    assert len(line.encode()) <= LENGTH_MAX
    assert line.endswith(f"; 2 workers, 3 connections; {PROBLEM}; other")
    rest = line.removeprefix("Listening on ").partition("; ")[2]
    if len(f"{listening}; {rest}".encode()) <= LENGTH_MAX:
        assert line == f"{listening}; {rest}"
    else:
        assert line.startswith(f"Listening on {name}, ")
        assert line.endswith(f" ...; {rest}")


def test_problems_that_are_too_long_are_shortened() -> None:
    line = status_line(["Listening", "2 workers"], ["/" + 5000 * "x" + " is invalid"])
    assert len(line.encode()) == LENGTH_MAX
    assert line.endswith("x ...")
