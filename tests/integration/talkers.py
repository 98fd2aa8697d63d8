"""Clients that talk without pause, to see how a disturbance affects them."""

import threading
import time
from collections import Counter
from typing import Self

from integration.client import Client


class Talkers:
    """This many clients, each in its own thread.

    Each connects, asks a number of lines and connects again. What goes wrong is counted in
    `failures`: "refused", if no connection could be made; "cut", if one ended before its client
    ended it; "wrong", if an answer was wrong.
    """

    def __init__(self, address: str, count: int, lines: int = 20) -> None:
        self._address = address
        self._lines = lines
        self._threads = [threading.Thread(target=self._talk) for _ in range(count)]
        self._stop = threading.Event()
        self.answers = 0
        self.failures: Counter[str] = Counter()
        self.longest = 0.0  # seconds from a question to its answer, connecting included

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let all finish what they are saying."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _talk(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                client = Client(self._address)
            except OSError:
                self.failures["refused"] += 1
                continue
            try:
                self._converse(client, began)
            except OSError:
                self.failures["cut"] += 1
            client.close()

    def _converse(self, client: Client, began: float) -> None:
        for number in range(self._lines):
            line = b"line %d of client %d\n" % (number, client.port)
            client.send(line)
            answer = client.read_line()
            now = time.monotonic()
            self.longest, began = max(self.longest, now - began), now
            if answer != line.upper():
                self.failures["wrong" if answer.endswith(b"\n") else "cut"] += 1
                return
            self.answers += 1
