"""The lines of one connection that await their answers. Sans-IO: it neither sends nor receives.

No two lines are the same, even across runs. An answer that belongs to another line or to another
client is therefore recognised as wrong.
"""

from collections import deque
from collections.abc import Iterator

SHOWN = 60  # bytes of a wrong answer in the message


class WrongAnswerError(Exception):
    """The message shows the answer."""


class PendingLines:
    """Lines sent but not answered yet, the oldest first."""

    def __init__(self, name: str) -> None:
        """``name``, in lower case, is part of every line."""
        self.seq = 0  # number of the newest line
        self.pending: deque[tuple[int, float]] = deque()  # seq, and the time at which it was due
        self._name = name
        self._received = b""

    def ask(self, now: float) -> bytes:
        """The next line."""
        self.seq += 1
        self.pending.append((self.seq, now))
        return self._text(self.seq)

    def unanswered(self) -> bytes:
        """All pending lines."""
        return b"".join(self._text(seq) for seq, _ in self.pending)

    def receive(self, data: bytes) -> Iterator[tuple[int, float]]:
        """Process received data; yield each answered line, with the time at which it was due."""
        self._received += data
        while self._received:
            expected = self._text(self.pending[0][0]).upper() if self.pending else b""
            if expected and self._received.startswith(expected):
                self._received = self._received[len(expected) :]
                yield self.pending.popleft()
            elif expected.startswith(self._received):
                return  # the rest of it has not arrived yet
            else:
                raise WrongAnswerError(repr(self._received[:SHOWN])[1:])

    def give_up(self) -> list[int]:
        """Forget all pending lines and any partial answer; return the numbers of the lines."""
        given_up = [seq for seq, _ in self.pending]
        self.pending.clear()
        self._received = b""
        return given_up

    def _text(self, seq: int) -> bytes:
        return f"{self._name} seq={seq}\n".encode()
