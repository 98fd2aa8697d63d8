"""Clients of an HTTP service that reuse their connections.

As a program: HOST PORT CONNECTIONS. The service answers a POST request with its path and the sum
of the body, /slow... after a while, and /long with a known number of x. Most clients stay
connected, and send requests whole, in pieces or pipelined; the first of those in pieces is slow.
One in ten asks for what is slow without a pause, and one in a hundred asks for what is long and
reads slowly. A few more connect, ask once and leave, again and again. Every byte of every body is
compared.

Reports are those of numbered.py, and so is the way to ask for them.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from integration.application import LONG
from load.numbered import BRIEF, PAUSE, ROUND, SIP, TIMEOUT, Habits, Report

SIPS = 0.04  # seconds between two sips of a slow client

#: What a client may meet; the first that fits is counted.
FAULTS: dict[type[Exception], str] = {
    ConnectionRefusedError: "refused",
    ConnectionError: "reset",
    TimeoutError: "timed out",
    asyncio.IncompleteReadError: "ended",
    ValueError: "wrong",
}


class Client(Habits):
    """A connection, or one after the other if it is brief."""

    def __init__(self, load: "Load", number: int) -> None:
        super().__init__(number)
        self.load = load
        self.asked = 0.0  # when; 0 if nothing is due

    @property
    def is_busy(self) -> bool:
        return self.number % 10 == 8 and not self.is_brief

    @property
    def sends_pieces(self) -> bool:
        return self.number % 10 in (3, 4, 5, 6) and not self.is_brief

    async def run(self) -> None:
        """Be a client until the load finishes or, if it stays connected, until its first fault."""
        while not self.load.finishing:
            await asyncio.sleep(ROUND * self.random.random())
            try:
                await self.use_connection()
            except tuple(FAULTS) as error:
                fault = next(name for kind, name in FAULTS.items() if isinstance(error, kind))
                self.load.faults[fault] += 1
                self.load.open -= self.is_served
                if not self.is_brief:
                    return

    async def use_connection(self) -> None:
        with socket.socket() as sock:
            if self.is_slow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, self.load.address)
            self.reader, self.writer = await asyncio.open_connection(sock=sock)
            try:
                await self.converse()
            finally:
                self.asked = 0
                self.writer.close()

    async def converse(self) -> None:
        """Ask once, or again and again."""
        while not self.load.finishing:
            await self.ask()
            if self.is_brief:
                self.load.visits += 1
                return
            self.load.open += not self.is_served
            self.is_served = True
            if not self.is_busy:
                await asyncio.sleep(2 * ROUND * self.random.random())

    async def ask(self) -> None:
        """Send some requests, and compare the answers."""
        self.asked = time.monotonic()
        # Two long answers are more than can be handed over: the second would wait for the client.
        is_single = self.is_brief or self.is_slow or self.is_busy
        count = 1 if is_single else self.random.randrange(1, 4)
        asked = [self.question(number == 0) for number in range(count)]
        data = b"".join(request for request, _ in asked)
        ends = sorted(self.random.randrange(len(data)) for _ in range(2 * self.sends_pieces))
        for start, end in pairwise([0, *ends, len(data)]):
            self.writer.write(data[start:end])
            if end < len(data):
                await asyncio.sleep(PAUSE * self.random.random())
        for _, expected in asked:
            await self.answer(expected)
        self.asked = 0

    def question(self, is_first: bool) -> tuple[bytes, bytes]:
        """A request, and the body of its answer."""
        body = self.random.randbytes(self.random.randrange(1000))
        takes_time = self.is_busy or (is_first and self.sends_pieces)
        name = (b"/slow%d" if takes_time else b"/%d") % self.random.randrange(10**9)
        path = b"/long" if self.is_slow else name
        head = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (path, len(body))
        return head + body, b"x" * LONG if self.is_slow else b"%s %d" % (path, sum(body))

    async def answer(self, expected: bytes) -> None:
        """Receive an answer. Raises ValueError if it is not what is expected."""
        async with asyncio.timeout(TIMEOUT):
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = b"\r\ncontent-length: %d\r\n" % len(expected)
        if not head.startswith(b"http/1.1 200 ") or length not in head:
            raise ValueError(head)
        for start in range(0, len(expected), SIP):
            part = expected[start : start + SIP]
            async with asyncio.timeout(TIMEOUT):
                if await self.reader.readexactly(len(part)) != part:
                    raise ValueError(part)
            await asyncio.sleep(SIPS if self.is_slow else 0)
            self.progress()
        self.load.answered += 1
        self.load.bytes += len(head) + len(expected)

    def progress(self) -> None:
        now = time.monotonic()
        self.load.longest = max(self.load.longest, now - self.asked)
        self.asked = now


class Load:
    """All clients."""

    def __init__(self, address: tuple[str, int], connections: int) -> None:
        self.address = address
        self.open = self.answered = self.bytes = self.visits = 0
        self.longest = 0.0
        self.faults: Counter[str] = Counter()
        self.finishing = False
        self.clients = [Client(self, number) for number in range(-BRIEF, connections)]

    async def serve(self, reports: int) -> None:
        """Work until the end of input on `reports`, a descriptor."""
        asyncio.get_running_loop().add_reader(reports, self._asked, reports)
        await asyncio.gather(*(client.run() for client in self.clients))
        print(self.report(), flush=True)

    def report(self) -> str:
        now = time.monotonic()
        waits = [now - client.asked for client in self.clients if client.asked]
        longest, self.longest = max([self.longest, *waits]), 0.0
        numbers = (self.open, self.answered, self.bytes, self.visits, longest, self.faults)
        return json.dumps(Report(*numbers)._asdict())

    def _asked(self, reports: int) -> None:
        if os.read(reports, 4096):
            print(self.report(), flush=True)
        else:
            self.finishing = True
            asyncio.get_running_loop().remove_reader(reports)


if __name__ == "__main__":
    asyncio.run(Load((sys.argv[1], int(sys.argv[2])), int(sys.argv[3])).serve(0))
