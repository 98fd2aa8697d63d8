#!/usr/bin/python3
"""Answers each line with its number and its bytes reversed. No connection ends at a restart."""

import logging
import sys
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector, SelectorKey
from socket import socket
from typing import NoReturn

from outlive import Client, Order, Service

LINE_MAX = 65536


class Connection:
    """A client: its socket, the number of its lines, an unsent answer, an incomplete line."""

    def __init__(self, sock: socket, state: bytes) -> None:
        lines, length, rest = state.split(b" ", 2)
        self.socket = sock
        self.lines = int(lines)
        self.unsent, self.held = rest[: int(length)], rest[int(length) :]
        self.prefix = b""

    def state(self) -> bytes:
        return b"%d %d " % (self.lines, len(self.unsent)) + self.unsent + self.held

    def answer(self, data: bytes) -> bytes:
        *lines, self.held = (self.held + data).split(b"\n")
        first, self.lines = self.lines + 1, self.lines + len(lines)
        return b"".join(
            b"%s%d %s\n" % (self.prefix, number, line[::-1])
            for number, line in enumerate(lines, first)
        )

    def handle(self) -> int:
        """Send, or receive and answer; return the events to wait for, or 0 at the end."""
        with suppress(BlockingIOError):
            if not self.unsent:
                data = self.socket.recv(LINE_MAX)
                if not data or len(self.held) > LINE_MAX:
                    return 0
                self.unsent = self.answer(data)
            self.unsent = self.unsent[self.socket.send(self.unsent) :]
        return EVENT_WRITE if self.unsent else EVENT_READ


class Counter:
    """All connections, in one selector with the service itself."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.service = Service("counter", listen=("127.0.0.1", 7001))
        self.prefix = self.service.settings(path, parse)
        self.selector = DefaultSelector()
        self.selector.register(self.service, EVENT_READ)
        self.service.ready()

    def serve(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.data:
                    self.handle(key)
                    continue
                for event in self.service.events():
                    self.obey(event)

    def handle(self, key: SelectorKey) -> None:
        connection, events = key.data, 0
        connection.prefix = self.prefix
        with suppress(OSError):
            events = connection.handle()
        if not events:
            self.selector.unregister(connection.socket)
            connection.socket.close()
        elif events != key.events:
            self.selector.modify(connection.socket, events, connection)

    def obey(self, event: object) -> None:
        connections = [key.data for key in self.selector.get_map().values() if key.data]
        match event:
            case Client(sock, state):
                self.selector.register(sock, EVENT_WRITE, Connection(sock, state or b"0 0 "))
            case Order.RELOAD:
                self.prefix = self.service.settings(self.path, parse)
                self.service.ready()
            case Order.KEEP:
                rest = self.service.leave((one.socket, one.state()) for one in connections)
                self.end(Connection(sock, state) for sock, state in rest)
            case Order.END:
                self.end(connections)

    def end(self, connections: Iterable[Connection]) -> NoReturn:
        self.service.end((one.socket, one.unsent, one.answer) for one in connections)
        sys.exit()


def parse(text: str) -> bytes:
    return str(tomllib.loads(text).get("prefix", "")).encode()


def check(path: str) -> str | None:
    """What is wrong with a configuration file."""
    try:
        parse(Path(path).read_text())
    except (OSError, ValueError) as error:
        return f"{path}: {error}"
    return None


if __name__ == "__main__":
    if sys.argv[2:] == ["--check"]:
        sys.exit(check(sys.argv[1]))
    logging.basicConfig(level="INFO", format="%(message)s")
    Counter(sys.argv[1]).serve()
