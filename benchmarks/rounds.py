"""Runs the same workloads on all servers in rounds, so that a ratio compares the same moment."""

from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.load import Work, measure
from benchmarks.results import Results
from benchmarks.servers import Running, Server, started

#: A slow server takes part in every fifth round only: its distance is not a matter of per cents.
SLOW_EVERY = 5


def run_rounds(
    servers: Sequence[Server], works: Sequence[Work], rounds: int, seconds: float
) -> Results:
    """All servers of a round run at the same time, but only one has work; the others wait, which
    costs nothing."""
    results = Results()
    for number in range(rounds):
        taking_part = [one for one in servers if not one.slow or number % SLOW_EVERY == 0]
        with ExitStack() as stack:
            running = [stack.enter_context(started(server)) for server in taking_part]
            for work in works:
                print(f"round {number + 1} of {rounds}: {work.title}", flush=True)
                for one in running:
                    if one.server.can_do(work.options):
                        _measure(results, number, one, work, seconds)
    return results


def _measure(results: Results, number: int, running: Running, work: Work, seconds: float) -> None:
    server = running.server
    try:
        outcome = measure(running, work, seconds)
    except RuntimeError as error:
        results.failures.append(f"{work.title}: {error}")
        print(f"  {server.name:24} FAILED: {error}", flush=True)
        return
    results.add(server.name, work.title, number, outcome)
    print(
        f"  {server.name:24}{outcome.rate:14,.0f} {work.unit}/s"
        f"{outcome.cpu_us:10.3f} us CPU each, p99 {outcome.p99_us:,.0f} us",
        flush=True,
    )
