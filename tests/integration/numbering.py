"""A daemon for tests of `outlive`: it answers each line with its number and the line.

The line "listener" is answered with the name of the listener. Arguments: a configuration file,
or "" for none, and words that make the daemon differ.
"""

import logging
import os
import resource
import sys
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector

from outlive import Client, Item, Order, Service

SIZE = 65536


class Connection:
    """A client, and what it is owed."""

    def __init__(self, client: Client) -> None:
        number, length, rest = (client.state or b"0 0 ").split(b" ", 2)
        self.client = client
        self.number = int(number)
        self.unsent, self.held = rest[: int(length)], rest[int(length) :]

    @property
    def left(self) -> Client:
        """The connection, as it is left to the next process."""
        state = b"%d %d " % (self.number, len(self.unsent)) + self.unsent + self.held
        return self.client._replace(state=state)

    def answer(self, data: bytes) -> bytes:
        """The answers to the lines that are complete."""
        *lines, self.held = (self.held + data).split(b"\n")
        return b"".join(map(self._answer, lines))

    def _answer(self, line: bytes) -> bytes:
        self.number += 1
        match line:
            case b"listener":
                line = self.client.listener.encode()
            case b"files":
                line = b" ".join(os.read(fd, 100) for fd in self.client.files)
        return b"%d %s\n" % (self.number, line)

    def handle(self) -> int:
        """Receive, answer and send; the events to wait for, or 0 at the end."""
        with suppress(BlockingIOError):
            if not self.unsent:
                data = self.client.socket.recv(SIZE)
                if not data:
                    return 0
                self.unsent = self.answer(data)
            self.unsent = self.unsent[self.client.socket.send(self.unsent) :]
        return EVENT_WRITE if self.unsent else EVENT_READ


def main(path: str, *words: str) -> None:
    """Serve until told to stop."""
    logging.basicConfig(level="INFO", format="%(message)s")
    limits = [int(word.removeprefix("limit=")) for word in words if word.startswith("limit=")]
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    service = Service("numbering", listen=("127.0.0.1", 0))
    if path:
        logging.info("settings: %s", service.settings(path, int))
    logging.info("remembered: %r", service.remembered)
    with DefaultSelector() as selector:
        selector.register(service, EVENT_READ)
        service.ready("numbering lines")
        while True:
            for key, _ in selector.select():
                if key.data:
                    handle(selector, key.data, key.events)
                    continue
                for event in service.events():
                    obey(service, selector, event, path, words)


def handle(selector: DefaultSelector, one: Connection, events: int) -> None:
    """Serve one connection."""
    wanted = 0
    with suppress(OSError):
        wanted = one.handle()
    if not wanted:
        selector.unregister(one.client.socket)
        one.client.socket.close()
    elif wanted != events:
        selector.modify(one.client.socket, wanted, one)


def obey(
    service: Service,
    selector: DefaultSelector,
    event: Client | Item | Order,
    path: str,
    words: tuple[str, ...],
) -> None:
    """Do what an event calls for."""
    everyone: list[Connection] = [key.data for key in selector.get_map().values() if key.data]
    match event:
        case Client():
            if event.state and b"poison" in event.state and "fragile" in words:
                os._exit(3)
            selector.register(event.socket, EVENT_WRITE, Connection(event))
        case Item(state, files):
            logging.info("item: %r, %r", state, [os.read(fd, 100) for fd in files])
        case Order.RELOAD:
            if path:
                logging.info("settings: %s", service.settings(path, int))
            service.remember(b"reloaded")
            service.ready()
        case Order.KEEP:
            leave(service, everyone, words)
            sys.exit()
        case Order.END:
            service.end((one.client.socket, one.unsent, one.answer) for one in everyone)
            sys.exit()


def leave(service: Service, everyone: list[Connection], words: tuple[str, ...]) -> None:
    """Leave all connections, and what the words say."""
    left: list[Client | Item] = [one.left for one in everyone]
    if "items" in words:
        left.insert(0, Item(b"an item", (pipe(b"first"), pipe(b"second"))))
        left.insert(0, Item(b"bytes alone"))
    if "files" in words:
        files = (pipe(b"with"), pipe(b"files"))
        left = [one._replace(files=files) if isinstance(one, Client) else one for one in left]
    if "pairs" in words:
        pairs = [(one.client.socket, one.left.state or b"") for one in everyone]
        assert service.leave(pairs) == []
        return
    rest = service.leave(left, whole="whole" in words)
    ended = [Connection(one) for one in rest if isinstance(one, Client)]
    service.end((one.client.socket, one.unsent, one.answer) for one in ended)


def pipe(content: bytes) -> int:
    """A descriptor from which this can be read."""
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading


if __name__ == "__main__":
    main(*sys.argv[1:])
