"""One measurement: the load generator runs one workload on one running server."""

import contextlib
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
    factor: float = 1.0
    """How much longer than others it runs."""

    @property
    def only_connects(self) -> bool:
        """Whether a server that answers only at the end of input can do it."""
        return "--churn" in self.options


def _stream(line: int) -> Work:
    """Pieces of 1 to 65,536 bytes, without waiting for answers: they end anywhere in a line."""
    options = ("--connections=8", f"--line={line}", f"--depth={200_000 // line}", "--stream")
    return Work(f"8 connections, a stream of {line:,}-byte lines", options)


ONE_AT_A_TIME = Work(
    "50 connections, one 64-byte line at a time", ("--connections=50", "--line=64")
)
PIPELINED = Work(
    "50 connections, 256 lines of 64 bytes pipelined",
    ("--connections=50", "--line=64", "--depth=256"),
)
STREAM = _stream(65)
SHORT_LINES = _stream(13)
LONG_LINES = _stream(1000)
BULK = Work("8 connections, 64 KiB lines", ("--connections=8", "--line=65536"))
CONNECT = Work(
    "connect, one line, close; 32 at a time", ("--connections=32", "--churn"), "connections"
)
CONNECT_RESET = Work(
    "connect, one line, reset; 32 at a time", ("--connections=32", "--reset"), "connections"
)
SOURCES = Work(
    "connect from 4,096 addresses, one line, close; 32 at a time",
    ("--connections=32", "--churn", "--sources=4096"),
    "connections",
)
BESIDE_IDLE = Work(
    "50 connections, one 64-byte line at a time, next to 10,000 idle ones",
    ("--connections=50", "--line=64", "--idle=10000"),
)
LATENCY_ALONE = Work("alone", ("--connections=1", "--line=64"))
LATENCY_BESIDE_BULK = Work(
    "next to bulk traffic", ("--connections=1", "--line=65536", "--depth=16", "--probe")
)
LATENCY_BESIDE_STREAMS = Work(
    "next to 100 streams",
    ("--connections=100", "--line=65", "--depth=3000", "--stream", "--probe"),
    factor=3,
)

RATES = (
    ONE_AT_A_TIME,
    PIPELINED,
    STREAM,
    SHORT_LINES,
    LONG_LINES,
    BULK,
    CONNECT,
    CONNECT_RESET,
    SOURCES,
    BESIDE_IDLE,
)
LATENCIES = (LATENCY_ALONE, LATENCY_BESIDE_BULK, LATENCY_BESIDE_STREAMS)


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
    if "--idle=10000" not in work.options:  # to open them warms up as well
        _load(running, work, seconds / 5)  # warms up caches and the specializing interpreter
    result, cpu = _load(running, work, seconds * work.factor)
    return Outcome(
        rate=result["lines"] / result["seconds"],
        cpu_us=cpu / result["lines"] * 1e6,
        server_busy=cpu / result["seconds"],
        load_busy=result["busy_seconds"] / result["seconds"],
        p50_us=result["p50_us"],
        p99_us=result["p99_us"],
        p999_us=result["p999_us"],
    )


def _load(running: Running, work: Work, seconds: float) -> tuple[dict[str, float], float]:
    """What the load generator says, and the CPU seconds of the server meanwhile."""
    command = ["/usr/bin/taskset", "--cpu-list", str(LOAD_CPU), str(BUILD / "load")]
    command += [f"--port={running.port}", f"--seconds={seconds}", *work.options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.readline()  # it is ready
        before = cpu_seconds(running.pid)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("\n")
            process.stdin.flush()
        said = process.stdout.readline()
        # The kernel counts in ticks: a server that hardly ran may have none.
        cpu = max(cpu_seconds(running.pid) - before, 1 / TICKS_PER_SECOND)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        error = process.stderr.read().strip()
    if process.returncode:
        raise RuntimeError(f"{running.server.name}: {error or 'no end'}")
    result: dict[str, float] = json.loads(said)
    return result, cpu
