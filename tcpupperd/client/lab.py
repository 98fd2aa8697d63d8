"""Exchanges with a listener named `lab`, whose answers may have any length."""

import os
import socket

from tcpupperd.client.exchange import Exchange
from tcpupperd.errors import ExpectedError
from tcpupperd.output import write_output
from tcpupperd.words import counted


class LabExchange(Exchange):
    """Sends orders from standard input. The end of the connection is the end of the answers."""

    def waits_for_server(self) -> bool:
        return bool(self.unsent) or not self.reading_input

    def require_complete(self) -> None:
        if self.fault:
            reason = f"{self.fault.strerror}{self.tally()}"
            raise ExpectedError(f"lost the connection to {self.name}: {reason}")
        if self.is_cut_short():
            raise ExpectedError(f"{self.name} closed the connection{self.tally()}")

    def is_cut_short(self) -> bool:
        """Whether the connection has ended before the server could do what it was asked."""
        return bool(self.unsent) or self.reading_input

    def reject_excess(self) -> None:
        pass

    def tally(self) -> str:
        return f" ({counted(self.answered, 'byte')} received)"


class LabOrder(LabExchange):
    """Sends one order after the other, and waits for each to be carried out.

    Nothing marks the end of an answer. Each order is therefore followed by one of the client's
    own, the answer to which is the mark. The sending side stays open meanwhile: a load balancer
    might otherwise treat the connection differently.
    """

    def __init__(self, server: socket.socket, name: str, timeout: float) -> None:
        super().__init__(server, name, None, timeout)
        token = f"tcpupper {os.urandom(6).hex()}"
        self._own_order = f"echo {token}\n".encode()
        self._mark = f'{{"text": "{token}"}}\n'.encode()
        self._held = b""  # may be the beginning of the mark
        self._awaits_mark = False

    def run_one(self, order: bytes) -> None:
        self.server.setblocking(False)
        self.restart_clock()
        self.take(order)
        while self.waits_for_server() and not self.answers_ended:
            self.turn()
        self.require_complete()

    def wants_input(self) -> bool:
        return False

    def take(self, chunk: bytes) -> None:
        self._awaits_mark = bool(chunk)
        super().take(chunk + self._own_order if chunk else b"")

    def waits_for_server(self) -> bool:
        return self._awaits_mark or super().waits_for_server()

    def print(self, answer: bytes) -> None:
        held = self._held + answer
        if held.endswith(self._mark):
            self._awaits_mark = False
            self.answered -= len(self._mark)
            held = held.removesuffix(self._mark)
        kept = common_end(held, self._mark) if answer and self._awaits_mark else 0
        shown = len(held) - kept
        write_output(held[:shown])
        self._held = held[shown:]

    def is_cut_short(self) -> bool:
        return self._awaits_mark


def common_end(data: bytes, mark: bytes) -> int:
    """The length of the longest end of `data` with which `mark` begins."""
    sizes = range(min(len(data), len(mark)), 0, -1)
    return next((size for size in sizes if data.endswith(mark[:size])), 0)
