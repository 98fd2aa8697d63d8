"""``tcpupper --ping``: lines at intervals over many connections, like ping(8)."""

import heapq
import math
import os
import resource
import signal
import time

from tcpupperd.client.options import PingOptions
from tcpupperd.client.ping_connection import PingConnection
from tcpupperd.client.ping_statistics import PingStatistics
from tcpupperd.client.poller import Poller
from tcpupperd.client.report import Report
from tcpupperd.client.signals import ENDS, Signals
from tcpupperd.errors import ExpectedError
from tcpupperd.output import write_output

GRACE = 1.0  # seconds for the lines in flight when a signal stops the run
BATCH = 100  # turns between checks for answers
SPARE = 32  # descriptors other than connections


class Ping:
    """The event loop. Its connections take turns that are spread evenly over the interval."""

    def __init__(self, options: PingOptions) -> None:
        """Look up the server's addresses; raises ExpectedError if there are none, or too few
        descriptors for the connections."""
        allow_descriptors(options.connections)
        options.endpoint.addresses()  # while signals still end the process
        self.options = options
        self.poller = Poller()
        self.statistics = PingStatistics()
        self.output: list[str] = []  # since it was last written
        self.signals = Signals()
        self.poller.watch(self.signals.descriptor, self.obey_signals)
        start = time.monotonic()
        self.deadline = start + (options.deadline or math.inf)
        self.end = math.inf
        run = os.urandom(6).hex()
        count = options.connections
        self.connections = [self.make_connection(run, number) for number in range(count)]
        for number, connection in enumerate(self.connections):
            connection.turn = start + number * options.interval / count
        self.agenda = [(one.turn, number) for number, one in enumerate(self.connections)]

    def make_connection(self, run: str, number: int) -> PingConnection:
        name = f"connection={number + 1}"
        prefix = f"{name} " if self.options.connections > 1 else ""
        report = Report(self.output, prefix, self.options)
        name = f"tcpupper {run} {name}"
        return PingConnection(name, self.options, self.poller, self.statistics, report)

    def run(self) -> bool:
        """Run until all lines are sent and answered, or until stopped; return whether nothing was
        lost."""
        if self.options.show != "json":
            self.output.append(self.header())
        while not self.has_ended():
            self.write()
            # Only a check that began after a deadline proves that an answer is late. An earlier
            # one may have missed it while Ctrl-Z had suspended this process.
            now = time.monotonic()
            for call in self.poller.wait(self.next_time() - now):
                call()
            self.run_due(now)
        for connection in self.connections:
            connection.end()
        if self.options.show != "json":
            self.output.append(f"--- {self.options.endpoint.name} ping statistics ---\n")
        self.output.append(self.summary())
        self.write()
        statistics = self.statistics
        return statistics.is_complete if self.options.allow_disconnects else statistics.is_perfect

    def summary(self) -> str:
        return (
            self.statistics.as_json() if self.options.show == "json" else self.statistics.summary()
        )

    def header(self) -> str:
        count = self.options.connections
        each = f" on each of {count} connections" if count > 1 else ""
        return (
            f"PING {self.options.endpoint.name}: a line every {self.options.interval:g} s{each}\n"
        )

    def has_ended(self) -> bool:
        if any(connection.has_turn for connection in self.connections):
            return False
        return not self.statistics.outstanding or time.monotonic() >= self.end

    def next_time(self) -> float:
        """The time at which something is due next."""
        turn = self.agenda[0][0] if self.agenda else math.inf
        return min(turn, self.end, self.deadline)

    def run_due(self, now: float) -> None:
        """Do some of what is due."""
        if now >= self.deadline:
            self.stop(math.inf)  # every line has its own time limit
        for _ in range(BATCH):
            if not self.agenda or self.agenda[0][0] > now:
                return
            _, number = heapq.heappop(self.agenda)
            due = self.connections[number].run_due(now)
            if due is not None:
                heapq.heappush(self.agenda, (due, number))

    def stop(self, grace: float) -> None:
        """Send no more lines, and wait this many seconds for outstanding answers."""
        self.deadline = math.inf
        self.end = time.monotonic() + grace
        for connection in self.connections:
            connection.stop()

    def obey_signals(self) -> None:
        received = self.signals.received()
        if received & set(ENDS):
            self.stop(GRACE)
        if signal.SIGQUIT in received:
            self.output.append(self.summary())

    def write(self) -> None:
        write_output("".join(self.output).encode())
        self.output.clear()


def allow_descriptors(connections: int) -> None:
    """Raise the soft limit if the connections need it."""
    need = connections + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= need:
        return
    if hard < need:
        raise ExpectedError(
            f"{connections} connections need {need} descriptors, but the hard limit is {hard};"
            " raise it (ulimit -Hn) or use fewer connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
