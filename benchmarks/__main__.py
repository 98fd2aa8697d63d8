"""Measure, and write everything that follows: tables, figure, numbers in the documentation."""

import argparse
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import build, figure, measures, report
from benchmarks.build import BUILD, build_all
from benchmarks.load import LATENCIES, RATES
from benchmarks.results import FILE, Results
from benchmarks.rounds import run_rounds
from benchmarks.servers import (
    CPUS,
    DAEMON,
    LIMIT,
    LOAD_CPU,
    SERVER_CPU,
    SERVERS,
    STANDARD,
    Server,
    measured_program,
)

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
    rounds, seconds = (2, 0.2) if options.short else (15, 0.2)
    results = run_rounds(servers, (*RATES, *LATENCIES), rounds, seconds)
    results.conditions = conditions(rounds, seconds)
    measure_once(results, servers, 3 if options.short else 15)
    write(results, short=options.short)
    print("\n" + report.tables(results), *results.failures, sep="\n")
    return 1 if results.failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks", description=__doc__)
    parser.add_argument(
        "--short",
        action="store_true",
        help="finish within three minutes, less accurately, and change no document",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="SERVER",
        help="measure this server in addition to the C server and socketserver; may be repeated;"
        " implies --short",
    )
    options = parser.parse_args()
    options.short = options.short or bool(options.only)
    return options


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


def conditions(rounds: int, seconds: float) -> dict[str, str]:
    cpu = next(
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    python = subprocess.check_output([build.PYTHON, "--version"], text=True).strip()
    return {
        "program": measured_program(),
        "cpu": cpu,
        "kernel": platform.release(),
        "python": python,
        "packages": ", ".join(build.versions()),
        "server_cpu": str(SERVER_CPU),
        "load_cpu": str(LOAD_CPU),
        "rounds": str(rounds),
        "seconds": f"{seconds:g}",
    }


def measure_once(results: Results, servers: Sequence[Server], rounds: int) -> None:
    """What needs no rounds."""
    for server in servers:
        if not server.one_shot:
            print(f"memory: {server.name}", flush=True)
            size = measures.memory_of_a_connection(server, IDLE_CONNECTIONS)
            results.memory[server.name] = size
    if DAEMON in servers:
        measure_daemon(results, rounds)


def measure_daemon(results: Results, rounds: int) -> None:
    """A measurement that fails costs no other."""
    for measurement in (
        measures.base_memory,
        partial(measures.starting, rounds),
        partial(measures.two_workers, seconds=0.3, rounds=rounds),
        partial(measures.spreading, workers=2, connections=4000),
        partial(measures.spreading, workers=4, connections=4000),
        partial(measures.replacing, rounds),
    ):
        print(f"measuring: {measurement}", flush=True)
        try:
            results.measures += measurement()
        except (OSError, RuntimeError) as error:
            results.failures.append(f"{measurement}: {error}")


def write(results: Results, *, short: bool) -> None:
    """Everything, or after a short run only its own tables, below build/."""
    if not short:
        # From the file, as `report` would do later: its numbers are rounded.
        report.write(report.files(Results.read(results.as_json())))
        return
    report.write(
        {
            BUILD / FILE.name: results.as_json(),
            BUILD / "results.md": report.tables(results),
            BUILD / "results.svg": figure.draw(report.panels(results)),
        }
    )


sys.exit(main())
