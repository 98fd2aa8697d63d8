"""The greeting line of a server. Sans-IO. See ``greeting`` in tcpupperd.toml(5)."""

LONGEST = 4096  # bytes kept of an endless line


class Greeting:
    """The first line on a connection, if it is expected."""

    def __init__(self, is_expected: bool) -> None:
        self.is_due = is_expected
        self._received = b""

    @property
    def text(self) -> str:
        """The greeting as far as it has arrived, made safe for a terminal."""
        text = self._received.decode(errors="replace")
        return "".join(letter if letter.isprintable() else "?" for letter in text)

    def strip(self, data: bytes) -> bytes:
        """The part of the received data that follows the greeting."""
        if not self.is_due:
            return data
        line, newline, rest = (self._received + data).partition(b"\n")
        self._received = line[:LONGEST]
        self.is_due = not newline
        return rest
