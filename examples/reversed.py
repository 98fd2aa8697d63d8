#!/usr/bin/python3
"""Sends each line back reversed. Connections survive a restart.

outlive/README.md explains the parts used.
"""

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector, DefaultSelector

from outlive import activation, channel
from outlive.notify import Notifier

FORMAT = channel.Format(b"reversed", 1)
LINE_MAX = 65536


@dataclass
class Connection:
    socket: socket.socket
    unsent: bytes = b""  # complete lines, so that unsent + held can be split again
    held: bytes = b""  # of an incomplete line

    def handle(self) -> int:
        """Send what is left, or else receive and answer; return the events to wait for, or 0."""
        with suppress(BlockingIOError):
            if not self.unsent:
                data = self.socket.recv(LINE_MAX)
                if not data or len(self.held) > LINE_MAX:
                    return 0
                *lines, self.held = (self.held + data).split(b"\n")
                self.unsent = b"".join(line[::-1] + b"\n" for line in lines)
            self.unsent = self.unsent[self.socket.send(self.unsent) :]
        return EVENT_WRITE if self.unsent else EVENT_READ


def serve(selector: BaseSelector) -> None:
    """Serve until a signal arrives."""
    while True:
        for key, _ in selector.select():
            match key.data:
                case Connection():
                    step(selector, key.data)
                case None:
                    return
                case listener:
                    with suppress(OSError):  # the client has already gone away
                        sock, _ = listener.accept()
                        sock.setblocking(False)
                        selector.register(sock, EVENT_READ, Connection(sock))


def step(selector: BaseSelector, connection: Connection) -> None:
    events = 0
    with suppress(OSError):
        events = connection.handle()
    if events:
        selector.modify(connection.socket, events, connection)
    else:
        selector.unregister(connection.socket)
        connection.socket.close()


def main() -> None:
    orders, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    notifier, kept = Notifier(os.environ), activation.keeps_descriptors(os.environ)
    passed = activation.passed_descriptors(os.environ, channel.NAMES)
    ends = {name: socket.socket(fileno=fd) for name, fd in passed.stored}
    ours = channel.open_channel(ends, notifier, store=kept)
    with DefaultSelector() as selector:
        selector.register(orders, EVENT_READ)
        for listener in passed.listening:
            listener.set_options(keepalive=60)
            selector.register(listener.socket, EVENT_READ, listener)
        for sock, state in channel.receive_all(ours.receive_end, FORMAT):
            unsent, newline, held = state.rpartition(b"\n")
            selector.register(sock, EVENT_WRITE, Connection(sock, unsent + newline, held))
        notifier.ready()
        serve(selector)
        if kept and orders.recv(1)[0] == signal.SIGUSR2:
            left = [key.data for key in selector.get_map().values()]
            states = [
                (one.socket, one.unsent + one.held) for one in left if type(one) is Connection
            ]
            channel.send_all(ours.send_end, FORMAT, states)


if __name__ == "__main__":
    main()
