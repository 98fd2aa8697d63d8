"""A client that is driven step by step by a test."""

import contextlib
import functools
import os
import secrets
import socket
from collections.abc import Callable

from waiting import DEADLINE, until

#: Begins the names of abstract sockets, which all that runs on a machine shares.
OWN = f"@tcpupperd-{secrets.token_hex(8)}"


class Client:
    """A connection to a daemon."""

    def __init__(self, address: str, receive_buffer: int = 0) -> None:
        """Connect to an address as the daemon writes it."""
        self.socket = make_socket(address)
        self.socket.settimeout(DEADLINE)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._answers = self.socket.makefile("rb")
        try:
            self.socket.connect(where(address))
        except OSError:
            self.close()
            raise

    @property
    def port(self) -> int:
        """Ours."""
        return int(self.socket.getsockname()[1])

    @property
    def peer_port(self) -> int:
        """The daemon's."""
        return int(self.socket.getpeername()[1])

    def send(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        self.socket.sendall(data)

    def ask(self, line: bytes) -> bytes:
        """Send a line, which lacks its newline, and return the answer without it."""
        self.send(line + b"\n")
        answer = self.read_line()
        assert answer.endswith(b"\n"), answer
        return answer[:-1]

    def read_line(self) -> bytes:
        """The next line; less of it at end of file."""
        return self._answers.readline()

    def read(self, size: int) -> bytes:
        """This many bytes; fewer at end of file."""
        return self._answers.read(size)

    def read_to_end(self) -> bytes:
        """Everything up to end of file."""
        return self._answers.read()

    def end(self) -> None:
        """Send no more: the daemon reads end of file."""
        self.socket.shutdown(socket.SHUT_WR)

    def wait_for_end(self) -> None:
        """Read until the daemon, or the kernel in its place, has closed the connection."""
        with contextlib.suppress(ConnectionResetError):
            self.read_to_end()

    def reset(self) -> None:
        """Close so that the daemon's kernel sees a reset (SO_LINGER of socket(7))."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()

    def close(self) -> None:
        """Close; it may be closed already."""
        self._answers.close()
        self.socket.close()

    def clog(self, is_clogged: Callable[[], bool], lines: memoryview | None = None) -> bytes:
        """Send lines without reading any until `is_clogged`; returns what was sent."""
        lines, sent = lines or many_lines(), 0

        def send_more() -> bool:
            nonlocal sent
            with contextlib.suppress(BlockingIOError):
                sent += self.socket.send(lines[sent : sent + 65536])
            return is_clogged()

        self.socket.setblocking(False)
        until(send_more)
        self.socket.settimeout(DEADLINE)
        return bytes(lines[:sent])


@functools.cache
def many_lines() -> memoryview:
    """More than the kernel's buffers between two sockets can hold; no two lines are the same."""
    text = b"one of many words " * 50
    return memoryview(b"".join(b"line %d: %s\n" % (number, text) for number in range(20_000)))


def make_socket(address: str) -> socket.socket:
    """A socket of an address's family."""
    if address.startswith(("/", "@")):
        return socket.socket(socket.AF_UNIX)
    return socket.socket(socket.AF_INET6 if address.startswith("[") else socket.AF_INET)


def where(address: str) -> tuple[str, int] | str:
    """An address as the daemon writes it, as `socket.connect` takes it."""
    if address.startswith(("/", "@")):
        return address.replace("@", "\0", 1)
    return endpoint(address)


def endpoint(address: str) -> tuple[str, int]:
    """The host and port of an address as the daemon writes it."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def name_of(one: socket.socket) -> str:
    """A socket's address as the daemon writes it."""
    name = one.getsockname()
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return os.fsdecode(name).replace("\0", "@")


def is_refused(address: str) -> bool:
    """Whether nothing is listening there."""
    with make_socket(address) as one:
        try:
            one.connect(where(address))
        except ConnectionRefusedError:
            return True
    return False


def ask(one: socket.socket, line: bytes) -> bytes:
    """Send something; the line that arrives after that."""
    one.sendall(line)
    answer = b""
    while not answer.endswith(b"\n") and (byte := one.recv(1)):
        answer += byte
    return answer
