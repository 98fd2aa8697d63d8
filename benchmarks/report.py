"""The tables, in Markdown."""

import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import build
from benchmarks.figure import digits
from benchmarks.load import (
    LATENCIES,
    LATENCY_ALONE,
    LATENCY_BESIDE_BULK,
    ONE_AT_A_TIME,
    RATES,
    Work,
)
from benchmarks.measures import Row
from benchmarks.rounds import Rounds, spread
from benchmarks.servers import LIMIT, LOAD_CPU, SERVER_CPU, STANDARD, Server

NOTHING = "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def conditions(rounds: int, seconds: float) -> str:
    cpu = next(
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    python = subprocess.check_output([build.PYTHON, "--version"], text=True).strip()
    return (
        f"{cpu}, Linux {platform.release()}, {python}, {', '.join(build.versions())}.\n"
        f"Server on CPU {SERVER_CPU}, load generator on CPU {LOAD_CPU}. "
        f"Medians of {rounds} interleaved rounds of {seconds:g} s, lowest..highest in brackets;\n"
        "ratios are taken within a round. Every byte of every answer was checked.\n"
    )


def disturbance(results: Rounds) -> str:
    """A warning if other programs were running: otherwise the C server is hardly ever idle."""
    busy = results.median(LIMIT, ONE_AT_A_TIME, "server_busy")
    if busy >= 0.8:
        return ""
    return (
        "**Unreliable:** other programs were running, "
        f"and the C server got only {busy:.0%} of its CPU.\n"
    )


def summary(results: Rounds, servers: Sequence[Server]) -> str:
    """Each server's rates as shares of the limit's."""
    head = ["rate relative to the C server", *(work.title for work in RATES)]
    return table(head, ([server.name, *_shares(results, server)] for server in servers))


def _shares(results: Rounds, server: Server) -> list[str]:
    ratios = (results.ratios(server, LIMIT, work) for work in RATES)
    return [f"{spread(ratio, digits(ratio))}" if ratio else NOTHING for ratio in ratios]


def details(results: Rounds, servers: Sequence[Server], work: Work) -> str:
    head = (
        work.title,
        f"{work.unit}/s",
        "times socketserver",
        "CPU µs each",
        "CPU time relative to C",
        "server CPU busy",
        "load CPU busy",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
    )
    measured = (server for server in servers if results.outcomes[server, work])
    return table(head, (_details_row(results, server, work) for server in measured))


def _details_row(results: Rounds, server: Server, work: Work) -> list[str]:
    def median(figure: str) -> float:
        return results.median(server, work, figure)

    return [
        server.name,
        f"{median('rate'):,.0f}",
        _spread_or_nothing(results.ratios(server, STANDARD, work)),
        f"{median('cpu_us'):.3g}",
        _spread_or_nothing(results.ratios(server, LIMIT, work, "cpu_us")),
        f"{median('server_busy'):.0%}",
        f"{median('load_busy'):.0%}",
        *(f"{median(figure):,.0f}" for figure in ("p50_us", "p99_us", "p999_us")),
    ]


def _spread_or_nothing(ratios: list[float]) -> str:
    return spread(ratios) if ratios else NOTHING


def latencies(results: Rounds, servers: Sequence[Server]) -> str:
    head = (
        "latency of one connection, µs",
        *(f"{share}, {where}" for where in ("alone", "with bulk traffic") for share in _SHARES),
        "ratio of p99 with bulk traffic to p99 alone",
    )
    measured = (s for s in servers if all(results.outcomes[s, work] for work in LATENCIES))
    return table(head, (_latency_row(results, server) for server in measured))


_SHARES = {"p50": "p50_us", "p99": "p99_us", "p99.9": "p999_us"}


def _latency_row(results: Rounds, server: Server) -> list[str]:
    alone = results.outcomes[server, LATENCY_ALONE]
    beside = results.outcomes[server, LATENCY_BESIDE_BULK]
    growth = [beside[n].p99_us / alone[n].p99_us for n in alone.keys() & beside.keys()]
    figures = (
        results.median(server, work, figure) for work in LATENCIES for figure in _SHARES.values()
    )
    return [server.name, *(f"{figure:,.0f}" for figure in figures), spread(growth, 1)]


def memory(bytes_each: dict[Server, float], connections: int) -> str:
    head = (f"one of {connections:,} idle connections", "private bytes")
    return table(head, ([server.name, f"{size:,.0f}"] for server, size in bytes_each.items()))


def measures(rows: Iterable[Row]) -> str:
    return table(("other measurements of tcpupperd", "value", "target"), rows)
