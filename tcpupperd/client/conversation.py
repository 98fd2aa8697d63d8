"""A conversation on a terminal: each line is edited, sent and answered before the next."""

import contextlib
import os
import readline  # noqa: F401  makes input() edit lines
import signal
import sys
from collections.abc import Iterator
from io import TextIOWrapper

from tcpupperd.client.exchange import Exchange
from tcpupperd.output import write_output

PROMPT = "> "

#: How often to look for a signal that came while readline(3) handled a key, in seconds: input()
#: looks only if one interrupts its wait for the next key.
LOOK = 0.2


class Conversation(Exchange):
    """While a line is being typed, nothing is received; if the connection ends, this is noticed
    only afterwards."""

    def run(self) -> None:
        self.server.setblocking(False)
        while self.reading_input and not self.answers_ended:
            line = read_line()
            self.restart_clock()
            self.take(line)
            while self.waits_for_server() and not self.answers_ended:
                self.turn()
        self.require_complete()

    def wants_input(self) -> bool:
        return False


def read_line() -> bytes:
    """The next line, edited by readline(3); empty at the end of the input (Ctrl-D)."""
    assert isinstance(sys.stdin, TextIOWrapper)
    sys.stdin.reconfigure(errors="surrogateescape")  # pass other bytes through
    try:
        with interruptible():
            line = input(PROMPT) + "\n"
    except EOFError:
        write_output(b"\n")  # so that the shell has a line of its own
        return b""
    return line.encode(sys.stdin.encoding, "surrogateescape")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process as usual, but only after the terminal has been restored."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
    try:
        yield
    except KeyboardInterrupt:
        write_output(b"\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, before)
