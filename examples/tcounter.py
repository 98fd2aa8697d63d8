#!/usr/bin/python3
"""The line counter with trio, whose tasks keep what they know in objects: nothing is hidden.

It is one file, to be copied; its connections are therefore almost those of counter.py.
"""

import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

import trio

from outlive import Client, Order, Service

LINE_MAX = 65536


class Connection:
    """A client: its socket, the number of its lines, an unsent answer, an incomplete line."""

    def __init__(self, sock: socket.socket, state: bytes) -> None:
        lines, length, rest = state.split(b" ", 2)
        self.socket = trio.socket.from_stdlib_socket(sock)
        self.lines = int(lines)
        self.unsent, self.held = rest[: int(length)], rest[int(length) :]
        self.scope = trio.CancelScope()

    def state(self) -> bytes:
        return b"%d %d " % (self.lines, len(self.unsent)) + self.unsent + self.held

    def answer(self, data: bytes) -> bytes:
        *lines, self.held = (self.held + data).split(b"\n")
        first, self.lines = self.lines + 1, self.lines + len(lines)
        return b"".join(
            b"%d %s\n" % (number, line[::-1]) for number, line in enumerate(lines, first)
        )

    async def serve(self) -> None:
        """Serve until the client closes. When trio cancels `recv` or `send`, it has done all of
        its work or none, so what is in the object is complete."""
        while True:
            while self.unsent:
                self.unsent = self.unsent[await self.socket.send(self.unsent) :]
            data = await self.socket.recv(LINE_MAX)
            if not data or len(self.held) > LINE_MAX:
                return
            self.unsent = self.answer(data)

    def take(self) -> socket.socket:
        """The socket, taken away from trio."""
        sock = socket.socket(fileno=os.dup(self.socket.fileno()))
        self.socket.close()
        return sock


class Counter:
    """All connections, each with a task."""

    def __init__(self) -> None:
        self.service = Service("tcounter", listen=("127.0.0.1", 7003), signals=False)
        self.connections: set[Connection] = set()

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(*self.service.SIGNALS) as signals:
                nursery.start_soon(self.receive, signals)
                self.service.ready()
                order = await self.obey(nursery)
                for connection in self.connections:
                    connection.scope.cancel()
                nursery.cancel_scope.cancel()
        self.finish(order)

    async def receive(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            self.service.obey(number)

    async def obey(self, nursery: trio.Nursery) -> Order:
        """Serve until the service is told to stop or to restart."""
        while True:
            await trio.lowlevel.wait_readable(self.service)
            for event in self.service.events():
                match event:
                    case Client(sock, state):
                        connection = Connection(sock, state or b"0 0 ")
                        self.connections.add(connection)
                        nursery.start_soon(self.handle, connection)
                    case Order.RELOAD:
                        self.service.ready()
                    case Order.KEEP | Order.END:
                        return event

    async def handle(self, connection: Connection) -> None:
        with connection.scope:
            with suppress(OSError):
                await connection.serve()
            self.connections.discard(connection)
            connection.socket.close()

    def finish(self, order: Order) -> None:
        connections = [(one.take(), one) for one in self.connections]
        if order is Order.KEEP:
            rest = self.service.leave((sock, one.state()) for sock, one in connections)
            connections = [(sock, Connection(sock, state)) for sock, state in rest]
        self.service.end((sock, one.unsent, one.answer) for sock, one in connections)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    trio.run(Counter().serve)
    sys.exit()
