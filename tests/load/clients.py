"""The load generator `clients.c`, as tests use it."""

import json
import subprocess
from typing import NamedTuple

#: Of 500 connections of `clients.c`, those that never hang up by themselves.
LASTING = 487


class Report(NamedTuple):
    """What the clients met since they began; `silence` is of the time since the last report."""

    open: int  # connections at present, without those that soon hang up
    remaining: int  # of those that were open at the mark
    waiting: int  # clients that wait for an answer since before the mark
    opened: int
    bytes: int  # answered, and right
    refused: int
    reset: int  # by the server, or failed otherwise
    ended: int  # by the server
    wrong: int  # answers
    lost: int  # connections that ended without the answers that were due at the mark
    silence: float  # seconds: the longest that a client waited without hearing anything

    @property
    def faults(self) -> dict[str, int]:
        """All that a client could complain of, and how often; without what never happened."""
        names = ("refused", "reset", "ended", "wrong", "lost")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


class Clients:
    """Clients at work."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """`process` runs `clients.c` with pipes for standard input and output."""
        assert process.stdin
        assert process.stdout
        self._process = process
        self._requests, self._reports = process.stdin, process.stdout

    def report(self) -> Report:
        """How it stands."""
        return self._ask("\n")

    def mark(self) -> Report:
        """Mark this moment; later reports refer to it."""
        return self._ask("m\n")

    def finish(self) -> Report:
        """End all connections and wait for their last answers."""
        self._requests.close()
        report = self._read()
        assert self._process.wait(10) == 0
        return report

    def _ask(self, request: str) -> Report:
        self._requests.write(request)
        self._requests.flush()
        return self._read()

    def _read(self) -> Report:
        line = self._reports.readline()
        assert line, "the load generator has failed: see its standard error"
        return Report(**json.loads(line))
