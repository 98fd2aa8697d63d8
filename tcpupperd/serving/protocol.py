"""The service itself, sans I/O: the client's bytes in, the bytes of the answer out.

Upper-casing changes ASCII letters only and works byte by byte. All other bytes, such as those of
UTF-8, therefore pass unchanged, and chunk boundaries never affect what the client reads. All work
is done per chunk, never per line: with pipelined lines, this makes the service 20 to 30 times as
fast as a loop around ``readline``.
"""

from __future__ import annotations

from typing import Any


class Protocol:
    """What a connection expects of its protocol, with what most protocols do. Between two calls,
    `held` and the numbers are all that another process needs to continue."""

    __slots__ = ("finished", "held", "lines", "mid_line", "opening", "whole_lines")

    service = "upper"
    """The service that it belongs to."""

    identifies_client = False
    """Whether another protocol follows when this one has finished: its `successor`."""

    def __init__(self, opening: bytes = b"") -> None:
        self.opening = opening  # data to send as soon as the client has connected
        self.lines = 0  # answered so far
        self.mid_line = False  # a line or a request has begun but is not complete
        self.held: bytes | bytearray = b""  # the part of it that is kept
        self.finished = False  # nothing more will be answered
        self.whole_lines = False  # `turn` may answer complete lines while no line is incomplete

    def receive(self, data: bytes) -> bytes:
        """The answer to `data`."""
        return b""

    def receive_eof(self) -> bytes:
        """The answer at the end of input."""
        self.finish()
        return b""

    def finish(self) -> None:
        """Answer nothing more."""
        self.finished = True

    def successor(self, connection: Any) -> tuple[Protocol, bytes] | None:
        """The protocol for the client that this one has identified, and the data already received
        for it; None if the client is refused."""
        return None

    def resume(self, lines: int, mid_line: bool, held: bytes) -> bytes:
        """Continue where another process stopped; return the answer to the part of the held data
        that is due."""
        return b""


class LineProtocol(Protocol):
    """Answers each line once its newline has arrived, and holds the answer to an incomplete line.

    A line longer than `max_line` bytes is answered in pieces, so that no more than this is ever
    held. After `lines_per_connection` lines, unless this is 0, any more input is ignored.
    """

    __slots__ = ("_limit", "_max_line")

    def __init__(self, max_line: int, lines_per_connection: int = 0, opening: bytes = b"") -> None:
        super().__init__(opening)
        self._max_line = max_line
        self._limit = lines_per_connection
        # A subclass may answer lines differently.
        self.whole_lines = type(self) is LineProtocol and not lines_per_connection

    def receive(self, data: bytes) -> bytes:
        """The answer to all lines that `data` completes; b"" if it completes none."""
        if self.finished:
            return b""
        if self._limit:
            data = self._within_limit(data)
        end = data.find(b"\n") + 1
        if not end:
            return self._hold(data)
        rest = b""
        if end == len(data):
            self.lines += 1
        else:
            self.lines += count_lines(data)
            end = data.rfind(b"\n") + 1
            data, rest = data[:end], data[end:]
        self.mid_line = False
        answer = self._take_held() + data.upper() if self.held else data.upper()
        return answer + self._hold(rest) if rest else answer

    def receive_eof(self) -> bytes:
        """The answer to a last line without a newline."""
        self.lines += self.mid_line
        answer = bytes(self.held)
        self.finish()
        return answer

    def finish(self) -> None:
        """Answer nothing more; an incomplete line is dropped."""
        self.held = b""
        self.mid_line = False
        self.whole_lines = False
        self.finished = True

    def resume(self, lines: int, mid_line: bool, held: bytes) -> bytes:
        """Continue where another process stopped; return the answer to held input beyond
        `max_line`."""
        self.lines = lines
        self.finished = 0 < self._limit <= lines
        answer = self._hold(held) if held and not self.finished else b""
        self.mid_line = mid_line and not self.finished
        return answer

    def _within_limit(self, data: bytes) -> bytes:
        end = 0
        for _ in range(self._limit - self.lines):
            end = data.find(b"\n", end) + 1
            if not end:
                return data
        self.finished = True
        return data[:end]

    def _hold(self, data: bytes) -> bytes:
        """Keep the beginning of a line; return the answer once it is longer than `max_line`."""
        self.mid_line = True
        # Only new bytes are searched for newlines, and one bytearray grows in place. Joining and
        # searching the whole line for each chunk would be quadratic (29 s of CPU time instead of
        # 0.02 s for 1 MiB in pieces of 16 bytes).
        if self.held:
            self.held = bytearray(self.held) if isinstance(self.held, bytes) else self.held
            self.held += data.upper()
        else:
            self.held = data.upper()
        return self._take_held() if len(self.held) > self._max_line else b""

    def _take_held(self) -> bytes:
        answer = bytes(self.held)
        self.held = b""
        return answer


class ChunkProtocol(Protocol):
    """Answers data as it arrives; each received chunk counts as one line."""

    __slots__ = ("_limit",)

    def __init__(self, lines_per_connection: int = 0, opening: bytes = b"") -> None:
        super().__init__(opening)
        self._limit = lines_per_connection

    def receive(self, data: bytes) -> bytes:
        """The answer to `data`."""
        if self.finished:
            return b""
        self.lines += 1
        self.finished = self.lines == self._limit
        return data.upper()

    def resume(self, lines: int, mid_line: bool, held: bytes) -> bytes:
        """Continue where another process stopped; return the answer to the held data."""
        self.lines = lines
        self.finished = 0 < self._limit <= lines
        return held.upper()


def count_lines(data: bytes) -> int:
    """The number of newlines in `data`.

    `bytes.replace` finds them with memchr(3), `bytes.count` byte by byte: for 16 KiB in lines of
    64 bytes on Python 3.11, they take 5 and 16 microseconds; upper-casing takes 6.
    """
    return len(data) - len(data.replace(b"\n", b""))
