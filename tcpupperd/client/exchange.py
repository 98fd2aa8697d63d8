"""One exchange: sends text to the server and prints the answer.

The server upper-cases byte by byte, so a complete answer is as long as the input. The client
counts both, so it can tell a complete answer from a truncated one.
"""

import os
import socket
import time
from collections.abc import Callable
from select import POLLIN, POLLOUT, poll

from tcpupperd.errors import ExpectedError
from tcpupperd.output import write_output
from tcpupperd.words import counted

STDIN = 0
CHUNK = 262144  # bytes held in each direction; four times the capacity of a pipe


class Exchange:
    """Copies input to the server, and its answers to standard output, both at the same time.

    Answers are received even while no input can be sent: the server reads no more input until its
    answers have been read, so otherwise each side would wait for the other forever.
    """

    def __init__(
        self,
        server: socket.socket,
        name: str,
        text: bytes | None,
        timeout: float,
        show: Callable[[int], None] | None = None,
    ) -> None:
        """Send ``text``, or standard input if it is None; ``name`` is the server's name in
        messages. ``show`` is called with the number of bytes answered so far.

        ``timeout`` is the number of seconds for which the server may make no progress while an
        answer is due or input is unsent. Time spent waiting for local input or output does not
        count.
        """
        self.server = server
        self.show = show
        self.name = name
        self.timeout = timeout
        self.reading_input = text is None
        self.unsent = memoryview(text or b"")
        self.taken = len(self.unsent)  # bytes of input so far
        self.lines_taken = 0  # of these, the bytes in complete lines
        self.answered = 0
        self.answers_ended = False
        self.fault: OSError | None = None

    def run(self) -> None:
        """Return once everything has been answered; raise ExpectedError if something has not."""
        self.server.setblocking(False)
        self.restart_clock()
        self.send()
        while not self.answers_ended:
            self.turn()
        self.require_complete()

    def turn(self) -> None:
        """Wait until something can be done, and do it."""
        ready = self.wait()
        if STDIN in ready and self.reading_input:
            self.take_input()
        elif self.unsent:
            self.send()
        if self.server.fileno() in ready:
            self.receive()

    def wait(self) -> set[int]:
        """Return the descriptors that are ready; raise ExpectedError if the server is overdue."""
        poller = poll()
        poller.register(self.server, POLLIN | (POLLOUT if self.unsent else 0))
        if self.wants_input():
            poller.register(STDIN, POLLIN)
        if not self.waits_for_server():
            ready = {fd for fd, _ in poller.poll()}
            self.restart_clock()
            return ready
        time_left = max(0.0, self.deadline - time.monotonic())
        ready = {fd for fd, _ in poller.poll(1000 * time_left)}
        # Only a poll that began after the deadline proves that the server is late. An earlier one
        # may have missed an answer while Ctrl-Z had suspended this process.
        if time_left == 0 and self.server.fileno() not in ready:
            raise ExpectedError(f"no answer from {self.name} for {self.timeout:g} s{self.tally()}")
        return ready

    def wants_input(self) -> bool:
        return self.reading_input and not self.unsent

    def waits_for_server(self) -> bool:
        """Whether it is the server's turn: an incomplete line need not be answered yet."""
        return bool(self.unsent) or not self.reading_input or self.answered < self.lines_taken

    def restart_clock(self) -> None:
        self.deadline = time.monotonic() + self.timeout

    def take_input(self) -> None:
        try:
            self.take(os.read(STDIN, CHUNK))
        except BlockingIOError:  # another reader of the same pipe or terminal got there first
            return
        except OSError as error:
            raise ExpectedError(f"cannot read standard input: {error.strerror}") from error

    def take(self, chunk: bytes) -> None:
        """Send this input; empty input means that there will be no more."""
        if b"\n" in chunk:
            self.lines_taken = self.taken + chunk.rindex(b"\n") + 1
        self.taken += len(chunk)
        self.reading_input = bool(chunk)
        self.unsent = memoryview(chunk)
        self.send()

    def send(self) -> None:
        """Send what the kernel accepts now; after the last byte, close the sending side."""
        try:
            if self.unsent:
                # MSG_NOSIGNAL: SIGPIPE is meant for standard output; here, an error says more.
                count = self.server.send(self.unsent, socket.MSG_NOSIGNAL)
                self.unsent = self.unsent[count:]
                # The kernel accepts a lot before the server reads it: if an answer is due, only an
                # answer shows progress.
                if self.answered >= self.lines_taken:
                    self.restart_clock()
            if not self.unsent and not self.reading_input:
                self.server.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:
            # Answers that the server sent before the connection failed can still be received.
            self.fault = error
            self.unsent, self.reading_input = memoryview(b""), False

    def receive(self) -> None:
        try:
            answer = self.server.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self.fault, answer = self.fault or error, b""
        self.answered += len(answer)
        self.answers_ended = not answer
        self.print(answer)
        if self.show:
            self.show(self.answered)
        self.reject_excess()
        self.restart_clock()

    def print(self, answer: bytes) -> None:
        """Print part of the answer, or nothing at its end."""
        write_output(answer)

    def require_complete(self) -> None:
        if self.fault:
            reason = self.fault.strerror
            raise ExpectedError(f"lost the connection to {self.name}: {reason}{self.tally()}")
        if self.reading_input or self.unsent or self.answered < self.taken:
            raise ExpectedError(f"{self.name} closed the connection early{self.tally()}")

    def reject_excess(self) -> None:
        """Raise ExpectedError if the server sends more than it was asked for, such as a greeting.
        It might then wait for the client or close the connection, and the reason would remain
        hidden."""
        if self.answered > self.taken:
            raise ExpectedError(
                f"{self.name} is not a tcpupperd server: it sent {counted(self.answered, 'byte')}"
                f" in response to {self.taken}; check the address"
            )

    def tally(self) -> str:
        return f" ({self.answered} of {counted(self.taken, 'byte')} answered)"
