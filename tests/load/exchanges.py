"""Clients that exchange lines with a service, at a moderate pace, as behind a load balancer.

As a program: HOST PORT. Half of the clients make a new connection for each line, the other half
stay connected. Each line on standard input asks for a report, a JSON object; the last one follows
at end of input.
"""

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from waiting import DEADLINE, until

CLIENTS = 8  # of each kind
PACE = 0.03  # seconds between two lines of a client
TIMEOUT = DEADLINE  # seconds until a client gives up


class Report(NamedTuple):
    """What the clients met since they began; `longest` is of the time since the last report."""

    answered: int  # lines
    ended: int  # connections of clients that stay connected, by the other side
    longest: float  # seconds that a line took, including to connect
    faults: dict[str, int]  # anything else that a client could complain of, and how often


class Exchanges:
    """Clients at work in another process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """`process` runs this program with pipes for standard input and output."""
        assert process.stdin
        assert process.stdout
        self._process = process
        self._requests, self._reports = process.stdin, process.stdout

    def report(self) -> Report:
        """How it stands."""
        self._requests.write("\n")
        self._requests.flush()
        return self._read()

    def go_on(self, lines: int = 200) -> float:
        """Wait until this many more lines are answered; the longest that one of them, or of those
        since the last report, took."""
        began = self.report()
        longest = [began.longest]

        def enough() -> bool:
            report = self.report()
            longest.append(report.longest)
            return report.answered >= began.answered + lines

        until(enough)
        return max(longest)

    def finish(self) -> Report:
        """End all clients."""
        self._requests.close()
        report = self._read()
        assert self._process.wait(2 * TIMEOUT) == 0
        return report

    def _read(self) -> Report:
        line = self._reports.readline()
        assert line, "the clients have failed: see their standard error"
        return Report(**json.loads(line))


class Load:
    """The clients, each in a thread."""

    def __init__(self, host: str, port: int) -> None:
        self._where = host, port
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._answered, self._ended, self._longest = 0, 0, 0.0
        self._faults: Counter[str] = Counter()
        self._threads = [
            threading.Thread(target=work, args=(number,))
            for number in range(CLIENTS)
            for work in (self._come_and_go, self._stay)
        ]
        for thread in self._threads:
            thread.start()

    def report(self) -> str:
        with self._lock:
            report = Report(self._answered, self._ended, self._longest, dict(self._faults))
            self._longest = 0.0
        return json.dumps(report._asdict())

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _come_and_go(self, number: int) -> None:
        while not self._over.wait(PACE):
            began = time.monotonic()
            try:
                with self._connected() as one:
                    if self._asked(one, number):
                        self._was_answered(began)
                    else:
                        self._complain("no answer")
            except OSError as error:
                self._complain(type(error).__name__)

    def _stay(self, number: int) -> None:
        while not self._over.is_set():
            try:
                with self._connected() as one:
                    while not self._over.wait(PACE):
                        began = time.monotonic()
                        if not self._asked(one, number):
                            self._was_ended()
                            break
                        self._was_answered(began)
            except (ConnectionResetError, BrokenPipeError):
                self._was_ended(reset=True)
            except OSError as error:
                self._complain(type(error).__name__)

    def _connected(self) -> socket.socket:
        return socket.create_connection(self._where, TIMEOUT)

    def _asked(self, one: socket.socket, number: int) -> bool:
        """Whether a line was answered before the end of the connection."""
        line = b"client %d at %d\n" % (number, time.monotonic_ns())
        one.sendall(line)
        answer = b""
        while not answer.endswith(b"\n"):
            data = one.recv(4096)
            if not data:
                return False
            answer += data
        if answer != line.upper():
            self._complain("wrong")
        return True

    def _was_answered(self, began: float) -> None:
        with self._lock:
            self._answered += 1
            self._longest = max(self._longest, time.monotonic() - began)

    def _was_ended(self, *, reset: bool = False) -> None:
        with self._lock:
            self._ended += 1
            if reset:
                self._faults["reset"] += 1

    def _complain(self, fault: str) -> None:
        with self._lock:
            self._faults[fault] += 1


if __name__ == "__main__":
    load = Load(sys.argv[1], int(sys.argv[2]))
    for _ in sys.stdin:
        print(load.report(), flush=True)
    load.end()
    print(load.report(), flush=True)
