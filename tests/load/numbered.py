"""Clients of a service that answers each line with its number and its bytes reversed.

As a program: HOST PORT CONNECTIONS. Most clients stay connected, and send lines whole, in pieces
or pipelined; one in a hundred sends four megabytes of lines and reads the answers slowly. A few
more connect, ask once and leave, again and again. Every byte of every answer is compared. As the
answers are numbered, a connection that has lost its state shows, too.

Each line on standard input asks for a report, a JSON object; at end of input, all clients wait for
their last answers, and the last report follows.
"""

import errno
import heapq
import json
import os
import random
import resource
import selectors
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from waiting import DEADLINE, until

ROUND = 2.0  # seconds between two requests of a client, on average
PAUSE = 0.3  # seconds between the pieces of a request
TIMEOUT = DEADLINE  # seconds until a client gives up
BRIEF = 10  # clients that connect again and again
SLOW = 100  # one in so many clients reads slowly
MUCH = 2**22  # bytes that it sends
SIP = 2**16  # bytes that it reads at a time
SIPS = 0.1  # seconds between two sips
TEXT = bytes(range(32, 127)) * 20  # what lines consist of
RECEIVE = 2**16


class Report(NamedTuple):
    """What the clients met since they began; `longest` is of the time since the last report."""

    open: int  # connections of clients that stay connected, as soon as they were answered
    answered: int  # lines
    bytes: int  # of their answers
    visits: int  # of clients that leave again
    longest: float  # seconds without any part of an answer that was due
    faults: dict[str, int]  # refused, reset, ended, wrong, timed out, and how often


class Numbered:
    """A context manager with the clients at work in another process."""

    def __init__(self, process: subprocess.Popen[str], connections: int) -> None:
        """`process` runs this program with pipes for standard input and output."""
        assert process.stdin
        assert process.stdout
        self._process = process
        self.connections = connections
        self._requests, self._reports = process.stdin, process.stdout

    @classmethod
    def against(cls, address: tuple[str, int], connections: int) -> Self:
        """Start them here."""
        words = (sys.executable, __file__, address[0], str(address[1]), str(connections))
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True), connections)

    def __enter__(self) -> Self:
        with ExitStack() as unless_at_work:
            unless_at_work.push(self)
            until(lambda: self.report().open == self.connections, TIMEOUT)
            self.go_on()
            unless_at_work.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._process:
            self._process.kill()

    def report(self) -> Report:
        """How it stands."""
        self._requests.write("\n")
        self._requests.flush()
        return self._read()

    def go_on(self) -> float:
        """Wait until as many lines as there are connections have been answered in addition; the
        longest that a client waited meanwhile."""
        began = self.report()
        longest = [began.longest]

        def enough() -> bool:
            report = self.report()
            longest.append(report.longest)
            return report.answered >= began.answered + self.connections

        until(enough, TIMEOUT)
        return max(longest)

    def finish(self) -> Report:
        """Let all clients get their last answers, and end them."""
        self._requests.close()
        report = self._read()
        assert self._process.wait(TIMEOUT) == 0
        return report

    def _read(self) -> Report:
        line = self._reports.readline()
        assert line, "the clients have failed: see their standard error"
        return Report(**json.loads(line))


class Habits:
    """What a client does, which its number decides. It is brief if that is negative."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.random = random.Random(number)
        self.is_served = False  # until then, it may wait in the accept queue

    @property
    def is_slow(self) -> bool:
        return self.number % SLOW == SLOW - 1 and not self.is_brief

    @property
    def is_brief(self) -> bool:
        return self.number < 0


class Client(Habits):
    """A connection, and what is still to be sent and to be received on it."""

    def __init__(self, load: "Load", number: int) -> None:
        super().__init__(number)
        self.load = load
        self.lines = 0
        self.outgoing = b""
        self.due = bytearray()
        self.progress = 0.0  # when something was sent or received
        self.socket: socket.socket | None = None

    def connect(self) -> None:
        sock = socket.socket()
        if self.is_slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)
        sock.setblocking(False)
        self.socket, self.lines = sock, 0
        self.due.clear()
        self.progress = time.monotonic()
        if (code := sock.connect_ex(self.load.address)) not in (0, errno.EINPROGRESS):
            self.fail(code)
            return
        self.load.selector.register(sock, selectors.EVENT_WRITE, self.connected)

    def connected(self) -> None:
        assert self.socket
        if code := self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.fail(code)
            return
        self.listen(selectors.EVENT_READ)
        self.load.after(0 if self.is_brief else ROUND * self.random.random(), self.ask)

    def listen(self, events: int) -> None:
        """Wait for events; a slow client looks for input only from time to time."""
        if self.is_slow:
            events &= ~selectors.EVENT_READ
        if self.socket:
            with_nothing = self.socket not in self.load.selector.get_map()
            if events and with_nothing:
                self.load.selector.register(self.socket, events, self.act)
            elif events:
                self.load.selector.modify(self.socket, events, self.act)
            elif not with_nothing:
                self.load.selector.unregister(self.socket)

    def ask(self) -> None:
        """Send a request, if the last one has been answered."""
        if not self.socket or self.load.finishing:
            return
        self.progress = time.monotonic()
        data = b"".join(self.question() for _ in range(self.how_many()))
        if self.number % 10 in (3, 4, 5, 6) and not self.is_brief:  # in pieces
            middle = self.random.randrange(len(data))
            self.outgoing = data[:middle]
            self.load.after(PAUSE * self.random.random(), lambda: self.more(data[middle:]))
        else:
            self.outgoing = data
        self.send()
        if self.is_slow:
            self.load.after(SIPS, self.sip)

    def how_many(self) -> int:
        if self.is_slow:
            return MUCH // 1000
        return self.random.randrange(1, 40) if self.number % 10 > 6 else 1

    def question(self) -> bytes:
        """A line; its answer is due from now on."""
        self.lines += 1
        length = 1000 if self.is_slow else self.random.randrange(100)
        start = self.random.randrange(len(TEXT) - length)
        line = b"%d-%d-" % (self.number, self.lines) + TEXT[start : start + length]
        self.due += b"%d %s\n" % (self.lines, line[::-1])
        return line + b"\n"

    def more(self, data: bytes) -> None:
        self.outgoing += data
        self.send()

    def send(self) -> None:
        if not self.socket:
            return
        try:
            sent = self.socket.send(self.outgoing)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.fail(error.errno)
            return
        self.outgoing = self.outgoing[sent:]
        self.listen(selectors.EVENT_READ | selectors.EVENT_WRITE * bool(self.outgoing))

    def act(self) -> None:
        """Something can be sent or received."""
        if self.outgoing:
            self.send()
        if not self.is_slow:
            self.receive(RECEIVE)

    def sip(self) -> None:
        if self.due and self.socket:
            self.receive(SIP)
            self.load.after(SIPS, self.sip)

    def receive(self, size: int) -> None:
        if not self.socket:
            return
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(error.errno)
            return
        if not data:
            self.complain("ended")
        elif data != self.due[: len(data)]:
            self.complain("wrong")
        else:
            self.got(data)

    def got(self, data: bytes) -> None:
        now = time.monotonic()
        self.load.longest = max(self.load.longest, now - self.progress)
        self.progress = now
        if not (self.is_brief or self.is_served):
            self.is_served = True
            self.load.open += 1
        del self.due[: len(data)]
        self.load.answered += data.count(b"\n")
        self.load.bytes += len(data)
        if not self.due and self.is_brief:
            self.load.visits += 1
            self.close()
            self.load.after(ROUND / 10, self.connect)
        elif not self.due:
            self.load.after(2 * ROUND * self.random.random(), self.ask)

    def fail(self, code: int | None) -> None:
        known = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset", errno.EPIPE: "reset"}
        self.complain(known.get(code or 0, errno.errorcode.get(code or 0, "?")))

    def complain(self, fault: str) -> None:
        self.load.faults[fault] += 1
        self.load.open -= self.is_served
        self.close()
        if self.is_brief:
            self.load.after(ROUND, self.connect)

    def close(self) -> None:
        if self.socket:
            self.outgoing, self.is_served = b"", False
            if self.socket in self.load.selector.get_map():
                self.load.selector.unregister(self.socket)
            self.socket.close()
            self.socket = None


class Load:
    """All clients."""

    def __init__(self, address: tuple[str, int], connections: int) -> None:
        self.address = address
        self.selector = selectors.DefaultSelector()
        self.open = self.answered = self.bytes = self.visits = 0
        self.longest = 0.0
        self.faults: Counter[str] = Counter()
        self.finishing = False
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._timer = 0
        self._clients = [Client(self, number) for number in range(-BRIEF, connections)]
        for index, client in enumerate(self._clients):
            self.after(index * 0.0005, client.connect)

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self._timer += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._timer, action))

    def serve(self, reports: int) -> None:
        """Work until the end of input on `reports`, a descriptor."""
        self.selector.register(reports, selectors.EVENT_READ, lambda: self._asked(reports))
        self._turns(lambda: not self.finishing)
        deadline = time.monotonic() + TIMEOUT
        self._turns(lambda: any(self._busy()) and time.monotonic() < deadline)
        self.faults["timed out"] += len(list(self._busy()))
        print(self.report(), flush=True)

    def report(self) -> str:
        open_, longest, self.longest = self.open, self._longest(), 0.0
        faults = {name: count for name, count in self.faults.items() if count}
        numbers = (open_, self.answered, self.bytes, self.visits, longest, faults)
        return json.dumps(Report(*numbers)._asdict())

    def _asked(self, reports: int) -> None:
        if os.read(reports, 4096):
            print(self.report(), flush=True)
        else:
            self.finishing = True
            self.selector.unregister(reports)

    def _longest(self) -> float:
        now = time.monotonic()
        return max([self.longest, *(now - client.progress for client in self._busy())])

    def _busy(self) -> Iterator[Client]:
        return (client for client in self._clients if client.due and client.socket)

    def _turns(self, condition: Callable[[], bool]) -> None:
        while condition():
            timeout = self._timers[0][0] - time.monotonic() if self._timers else 1
            for key, _ in self.selector.select(max(0, min(timeout, 1))):
                key.data()
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()


if __name__ == "__main__":
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2
    )
    Load((sys.argv[1], int(sys.argv[2])), int(sys.argv[3])).serve(0)
