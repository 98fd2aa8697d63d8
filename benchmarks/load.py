"""One measurement: the load generator does one work on one running server."""

import json
import subprocess
from dataclasses import dataclass

from benchmarks.build import BUILD
from benchmarks.processes import TICKS_PER_SECOND, cpu_seconds
from benchmarks.servers import LOAD_CPU, Running


@dataclass(frozen=True)
class Work:
    title: str
    options: tuple[str, ...]
    """Of the load generator; see ``load.c``."""
    unit: str = "lines"


ONE_AT_A_TIME = Work(
    "50 connections, one 64-byte line at a time", ("--connections=50", "--line=64")
)
PIPELINED = Work(
    "50 connections, 256 lines of 64 bytes pipelined",
    ("--connections=50", "--line=64", "--depth=256"),
)
BULK = Work("8 connections, 64 KiB lines", ("--connections=8", "--line=65536"))
CONNECTION_RATE = Work(
    "connect, one line, close; 32 at a time", ("--connections=32", "--churn"), "connections"
)
LATENCY_ALONE = Work("one connection alone", ("--connections=1", "--line=64"))
LATENCY_BESIDE_BULK = Work(
    "one connection beside a bulk client that never stops",
    ("--connections=1", "--line=65536", "--depth=16", "--probe"),
)

RATES = (ONE_AT_A_TIME, PIPELINED, BULK, CONNECTION_RATE)
LATENCIES = (LATENCY_ALONE, LATENCY_BESIDE_BULK)


@dataclass(frozen=True)
class Outcome:
    rate: float
    """Lines or connections a second."""
    cpu_us: float
    """CPU microseconds of the server for each of them."""
    server_busy: float
    """Share of the time in which the server used its CPU; ``load_busy``: the load generator."""
    load_busy: float
    p50_us: float
    p99_us: float
    p999_us: float


def measure(running: Running, work: Work, seconds: float) -> Outcome:
    """Raise ``RuntimeError`` if the server answers wrongly, falls silent or closes too early."""
    _load(running, work, seconds / 5)  # warms up caches and the specializing interpreter
    cpu_before = cpu_seconds(running.pid)
    result = _load(running, work, seconds)
    # The kernel counts in ticks: a server that hardly ran may have none.
    cpu = max(cpu_seconds(running.pid) - cpu_before, 1 / TICKS_PER_SECOND)
    return Outcome(
        rate=result["lines"] / result["seconds"],
        cpu_us=cpu / result["lines"] * 1e6,
        server_busy=cpu / result["seconds"],
        load_busy=result["busy_seconds"] / result["seconds"],
        p50_us=result["p50_us"],
        p99_us=result["p99_us"],
        p999_us=result["p999_us"],
    )


def _load(running: Running, work: Work, seconds: float) -> dict[str, float]:
    command = ["/usr/bin/taskset", "--cpu-list", str(LOAD_CPU), str(BUILD / "load")]
    command += [f"--port={running.port}", f"--seconds={seconds}", *work.options]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{running.server.name}: {process.stderr.strip() or 'no end'}")
    result: dict[str, float] = json.loads(process.stdout)
    return result
