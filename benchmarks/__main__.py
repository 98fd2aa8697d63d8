"""Build, measure, and write the tables, the figure and the figures for programs."""

import argparse
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks import figure, measures, report
from benchmarks.build import BUILD, HERE, build_all
from benchmarks.load import LATENCIES, RATES
from benchmarks.rounds import Rounds
from benchmarks.servers import CPUS, DAEMON, LIMIT, SERVERS, STANDARD, Server

IDLE_CONNECTIONS = 10_000
"""The default limit per worker of the daemon."""


def main() -> int:
    options = parse_arguments()
    if len(CPUS) < 2:
        sys.exit("benchmarks: two CPUs are needed, one for the server and one for the load")
    if not shutil.which("gcc"):
        sys.exit("benchmarks: gcc is needed, for the load generator and the C server")
    allow_many_files()
    build_all()
    servers = choose(options.only)
    rounds, seconds = (2, 0.3) if options.short else (15, 0.3)
    results = Rounds()
    results.run(servers, (*RATES, *LATENCIES), rounds, seconds)
    parts = [report.conditions(rounds, seconds), report.disturbance(results)]
    parts += [report.summary(results, servers)]
    parts += [report.details(results, servers, work) for work in RATES]
    parts += [report.latencies(results, servers), *once(servers, options.short)]
    files = {
        "results.md": "# Measured\n\n" + "\n".join(parts),
        "results.svg": figure.draw(ratios(results, servers)),
        "results.json": results.as_json(),
    }
    write(BUILD if options.short else HERE / "results", files)
    print("\n" + "\n".join(parts), *results.failures, sep="\n")
    return 1 if results.failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks", description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="finish within two minutes, less accurately"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="SERVER",
        help="measure this server in addition to the C server and socketserver; may be repeated",
    )
    return parser.parse_args()


def allow_many_files() -> None:
    """The idle connections need two file descriptors each: one here, one in the server."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def choose(only: Sequence[str] | None) -> list[Server]:
    for server in SERVERS:
        if server.missing:
            print(f"{server.name} skipped: {server.command[0]} not found")
    wanted = {*only, LIMIT.name, STANDARD.name} if only else {server.name for server in SERVERS}
    return [server for server in SERVERS if server.name in wanted and not server.missing]


def once(servers: Sequence[Server], short: bool) -> list[str]:
    """The tables that need no rounds."""
    holding = [server for server in servers if not server.one_shot]
    memory = {}
    for server in holding:
        print(f"memory: {server.name}", flush=True)
        memory[server] = measures.memory_of_a_connection(server, IDLE_CONNECTIONS)
    tables = [report.memory(memory, IDLE_CONNECTIONS)]
    if DAEMON in servers:
        tables.append(report.measures(daemon_rows(3 if short else 15)))
    return tables


def daemon_rows(rounds: int) -> list[measures.Row]:
    print("starting, workers, replacing", flush=True)
    return [
        *measures.base_memory(),
        *measures.starting(rounds),
        *measures.two_workers(seconds=0.5, rounds=rounds),
        measures.spreading(workers=2, connections=4000),
        measures.spreading(workers=4, connections=4000),
        measures.replacing(rounds),
    ]


def ratios(results: Rounds, servers: Sequence[Server]) -> figure.Panels:
    """The ratios for the figure, of each server that could do a work to the limit."""
    panels: dict[str, dict[str, figure.Ratios]] = {}
    for work in RATES:
        measured = {server.name: results.ratios(server, LIMIT, work) for server in servers}
        panels[work.title] = {
            name: figure.Ratios(median(found), min(found), max(found))
            for name, found in measured.items()
            if found
        }
    return panels


def write(directory: Path, files: Mapping[str, str]) -> None:
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


sys.exit(main())
