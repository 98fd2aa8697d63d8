"""One connection of a ping: sends lines, verifies the answers, and reconnects when it is lost."""

import contextlib
import os
import socket
import time

from tcpupperd.client.endpoint import ends, reason
from tcpupperd.client.greeting import Greeting
from tcpupperd.client.options import PingOptions
from tcpupperd.client.pending_lines import PendingLines, WrongAnswerError
from tcpupperd.client.ping_statistics import PingStatistics, milliseconds
from tcpupperd.client.poller import Poller
from tcpupperd.client.report import Report

CHUNK = 65536  # bytes
PAUSE = 0.1  # seconds between a failed attempt to connect and the next


class PingConnection:
    """A line waits for its answer until the connection is lost, or for ``timeout`` seconds from
    its turn. Then all pending lines are lost, and the next turn begins with a new connection:
    attempts to connect are no more frequent than lines.
    """

    def __init__(
        self,
        name: str,
        options: PingOptions,
        poller: Poller,
        statistics: PingStatistics,
        report: Report,
    ) -> None:
        self.lines = PendingLines(name)
        self.turn = 0.0  # when the next line is due
        self.options = options
        self.poller = poller
        self.statistics = statistics
        self.report = report
        self.last = options.count  # seq of the last line; None if there is no end
        self.greeting = Greeting(False)
        self.socket: socket.socket | None = None
        self.is_connected = False
        self.was_connected = False
        self.attempts = 0
        self.failures = 0  # attempts since the last connection
        self.earliest_attempt = 0.0
        self.attempt_deadline = 0.0  # while it connects
        self.unsent = b""
        self.waiting_since: float | None = None  # the turn of the first line since an answer

    @property
    def has_turn(self) -> bool:
        """Whether another line will be sent."""
        return self.last is None or self.lines.seq < self.last

    def stop(self) -> None:
        """Send no more lines."""
        self.last = self.lines.seq
        self.close_if_done()

    def end(self) -> None:
        """Give up the lines that have not been answered."""
        self.lose("no answer before the run ended")
        self.close()
        if self.waiting_since is not None:
            self.statistics.add_gap(time.monotonic() - self.waiting_since)

    # Timing

    def run_due(self, now: float) -> float | None:
        """Do what is due; return when something may be due again, or None if nothing will be."""
        if self.lines.pending and self.deadline <= now:
            self.give_up()
        if self.is_connecting and self.attempt_deadline <= now:
            self.fail("timed out")
        if self.has_turn and self.turn <= now:
            self.ask()
        if self.lines.pending and not self.socket and self.earliest_attempt <= now:
            self.connect()
        times = [self.turn] if self.has_turn else []
        if self.lines.pending:
            times.append(self.deadline)
            if not self.socket:
                times.append(self.earliest_attempt)
            elif self.is_connecting:
                times.append(self.attempt_deadline)
        return min(times, default=None)

    @property
    def deadline(self) -> float:
        """The latest time at which the oldest pending line may be answered."""
        return self.lines.pending[0][1] + self.options.timeout

    @property
    def is_connecting(self) -> bool:
        return self.socket is not None and not self.is_connected

    def give_up(self) -> None:
        if self.is_connected:
            self.lose(f"no answer for {self.options.timeout:g} s")
        else:
            self.attempts += 1
            self.failures = 0
            self.lose("cannot connect: timed out")
        self.close()

    def ask(self) -> None:
        now = time.monotonic()
        missed = (now - self.turn) // self.options.interval  # skipped, to avoid bursts
        self.turn += self.options.interval * (1 + missed)
        line = self.lines.ask(now)
        self.statistics.sent += 1
        if self.waiting_since is None:
            self.waiting_since = now
        if self.is_connected:
            self.unsent += line
            self.flush()

    # Connecting

    def connect(self) -> None:
        addresses = self.options.endpoint.addresses()
        self.attempt_deadline = time.monotonic() + self.options.timeout / len(addresses)
        try:
            self.socket = self.options.endpoint.begin(*addresses[self.attempts % len(addresses)])
        except OSError as error:
            self.fail(reason(error))
        else:
            self.poller.watch(self.socket.fileno(), self.handle)

    def connect_error(self) -> int:
        """The error number with which an attempt to connect has failed, or 0."""
        if self.is_connected or not self.socket:
            return 0
        return self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def fail(self, why: str) -> None:
        """Try the next address; if all have failed, the pending lines are lost."""
        self.close()
        self.attempts += 1
        self.failures += 1
        if self.failures % len(self.options.endpoint.addresses()):
            self.connect()
        else:
            self.lose(f"cannot connect: {why}")
            self.earliest_attempt = time.monotonic() + PAUSE

    def begin(self) -> None:
        """The connection has been established."""
        assert self.socket
        self.is_connected = True
        self.failures = 0
        self.greeting = Greeting(self.options.greeting)
        self.unsent = self.lines.unanswered()
        how = f"connected {ends(self.socket)}" if self.options.verbose else "connected"
        if self.was_connected:
            self.statistics.reconnected += 1
            self.report.problem(f"re{how}")
        elif self.options.verbose:
            self.report.normal(how)
        self.was_connected = True

    # Conversing

    def handle(self) -> None:
        """Perform the operations for which the socket is ready."""
        if not self.socket:
            return  # closed after becoming ready
        if number := self.connect_error():
            self.fail(os.strerror(number))
            return
        try:
            if not self.is_connected:
                self.begin()
            self.flush()
            self.receive()
        except BlockingIOError:
            self.close_if_done()
        except WrongAnswerError as error:
            self.statistics.wrong += 1
            self.disconnect(f"wrong answer {error}")
        except OSError as error:
            self.close_if_done()  # a server may close the connection after the last answer
            if self.socket:
                self.disconnect(reason(error))

    def flush(self) -> None:
        """Send what the kernel accepts now. If the connection is lost, receiving shows this, after
        the answers that arrived before."""
        assert self.socket
        if self.unsent:
            with contextlib.suppress(OSError):
                count = self.socket.send(self.unsent, socket.MSG_NOSIGNAL)
                self.unsent = self.unsent[count:]

    def receive(self) -> None:
        """Receive until an exception: BlockingIOError once there is no more data, or another
        OSError if the connection has ended or failed."""
        assert self.socket
        while data := self.socket.recv(CHUNK):
            now = time.monotonic()
            for seq, turn in self.lines.receive(self.strip(data)):
                self.statistics.add_answer(now - turn)
                self.report.normal(f"seq={seq} time={milliseconds(now - turn)} ms")
                self.finish_gap(now)
        raise ConnectionError("the server closed the connection")

    def strip(self, data: bytes) -> bytes:
        """The data received, without the greeting, which is reported."""
        was_due = self.greeting.is_due
        rest = self.greeting.strip(data)
        if was_due and not self.greeting.is_due:
            self.report.normal(f"greeting: {self.greeting.text}")
        return rest

    def finish_gap(self, now: float) -> None:
        assert self.waiting_since is not None
        self.statistics.add_gap(now - self.waiting_since)
        pending = self.lines.pending
        self.waiting_since = pending[0][1] if pending else None

    # Losing

    def disconnect(self, why: str) -> None:
        """The connection ended."""
        self.close()
        self.statistics.disconnected += 1
        if not self.lines.pending:
            self.report.problem(f"disconnected: {why}")
        self.lose(why)

    def lose(self, why: str) -> None:
        """Count and report the pending lines as lost."""
        for seq in self.lines.give_up():
            self.statistics.lost += 1
            self.report.problem(f"seq={seq} lost: {why}")

    def close(self) -> None:
        if self.socket:
            self.socket.close()
        self.socket = None
        self.is_connected = False
        self.unsent = b""

    def close_if_done(self) -> None:
        if not self.has_turn and not self.lines.pending:
            self.close()
