"""``tcpupper``: sends text to a tcpupperd server and prints the answer. See tcpupper(1).

The server upper-cases byte by byte, so a complete answer is as long as the input. The client
counts both, and so can tell a complete answer from a truncated one.
"""

import argparse
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from select import POLLIN, POLLOUT, poll

from tcpupperd import __version__
from tcpupperd.arguments import Parser
from tcpupperd.words import counted

STDIN, STDOUT = 0, 1
CHUNK = 262144  # bytes held of each direction; four times the capacity of a pipe
LONGEST_TIMEOUT = 86400.0  # a day; far below what poll(2) can count in milliseconds


class ClientError(Exception):
    """The message that is printed before exit status 1."""


class Exchange:
    """Copies input to the server, and its answers to standard output, both at the same time.

    Answers are received even while no input can be sent: the server reads nothing more until its
    answers are gone, so otherwise each side would wait for the other forever.
    """

    def __init__(
        self, server: socket.socket, name: str, text: bytes | None, timeout: float
    ) -> None:
        """Send ``text``, or standard input if it is None; ``name`` is the server's in messages.

        ``timeout`` is the number of seconds that the server may make no progress while an answer
        is due or input is unsent. Time spent waiting for our own input or output does not count.
        """
        self.server = server
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
        """Return when everything was answered; raise ClientError if something was not."""
        self.server.setblocking(False)
        self.restart_clock()
        self.send()
        while not self.answers_ended:
            ready = self.wait()
            if STDIN in ready and self.reading_input:
                self.take_input()
            elif self.unsent:
                self.send()
            if self.server.fileno() in ready:
                self.receive()
        self.require_complete()

    def wait(self) -> set[int]:
        """Return the descriptors that are ready; raise ClientError if the server is overdue."""
        poller = poll()
        poller.register(self.server, POLLIN | (POLLOUT if self.unsent else 0))
        if self.reading_input and not self.unsent:
            poller.register(STDIN, POLLIN)
        if not self.waits_for_server():
            ready = {fd for fd, _ in poller.poll()}
            self.restart_clock()
            return ready
        time_left = max(0.0, self.deadline - time.monotonic())
        ready = {fd for fd, _ in poller.poll(1000 * time_left)}
        # Only a poll that began after the deadline shows that the server is late. An earlier one
        # may have missed an answer while Ctrl-Z had stopped this process.
        if time_left == 0 and self.server.fileno() not in ready:
            raise ClientError(f"no answer from {self.name} for {self.timeout:g} s{self.tally()}")
        return ready

    def waits_for_server(self) -> bool:
        """Whether it is the server's turn: an unfinished line need not be answered yet."""
        return bool(self.unsent) or not self.reading_input or self.answered < self.lines_taken

    def restart_clock(self) -> None:
        self.deadline = time.monotonic() + self.timeout

    def take_input(self) -> None:
        try:
            chunk = os.read(STDIN, CHUNK)
        except BlockingIOError:  # another reader of the same pipe or terminal was faster
            return
        except OSError as error:
            raise ClientError(f"cannot read standard input: {error.strerror}") from error
        if b"\n" in chunk:
            self.lines_taken = self.taken + chunk.rindex(b"\n") + 1
        self.taken += len(chunk)
        self.reading_input = bool(chunk)
        self.unsent = memoryview(chunk)
        self.send()

    def send(self) -> None:
        """Send what the kernel accepts now; after the last byte, end the input."""
        try:
            if self.unsent:
                # MSG_NOSIGNAL: SIGPIPE is for standard output; here, an error says more.
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
            # Answers that the server sent before it went away can still be received.
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
        write_output(answer)
        self.require_no_more_than_asked()
        self.restart_clock()

    def require_complete(self) -> None:
        if self.fault:
            reason = self.fault.strerror
            raise ClientError(f"lost the connection to {self.name}: {reason}{self.tally()}")
        if self.reading_input or self.unsent or self.answered < self.taken:
            raise ClientError(f"{self.name} closed the connection early{self.tally()}")

    def require_no_more_than_asked(self) -> None:
        """Raise ClientError if the server sends more than it was asked for, such as a greeting.
        It might then wait for us, or end the connection, and the reason would stay hidden."""
        if self.answered > self.taken:
            raise ClientError(
                f"{self.name} is not a tcpupperd server: it sent {counted(self.answered, 'byte')}"
                f" in answer to {self.taken}; check the address"
            )

    def tally(self) -> str:
        return f" ({counted(self.answered, 'byte')} answered of {self.taken})"


def write_output(data: bytes) -> None:
    """Write everything to standard output, waiting for its reader; raise ClientError on error."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(STDOUT, rest) :]
        except BlockingIOError:  # the process that started us made it non-blocking
            writable = poll()
            writable.register(STDOUT, POLLOUT)
            writable.poll()
        except OSError as error:
            raise ClientError(f"cannot write standard output: {error.strerror}") from error


def connect_tcp(host: str, port: int, timeout: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout)
    except UnicodeError as error:
        raise ClientError(f"cannot connect to '{host}': not a host name") from error


def connect_unix(path: str, timeout: float) -> socket.socket:
    """Connect to a Unix socket; ``@name`` is in the abstract namespace, as in systemd's units."""
    server = socket.socket(socket.AF_UNIX)
    try:
        server.settimeout(timeout)
        server.connect("\0" + path[1:] if path.startswith("@") else path)
    except OSError:
        server.close()
        raise
    return server


def connect(options: argparse.Namespace, name: str) -> socket.socket:
    try:
        if options.unix is not None:
            return connect_unix(options.unix, options.timeout)
        return connect_tcp(options.host, options.port, options.timeout)
    except OSError as error:
        raise ClientError(f"cannot connect to {name}: {error.strerror or error}") from error


def server_name(options: argparse.Namespace) -> str:
    """The server's name in messages: the path, host:port or [IPv6 address]:port."""
    if options.unix is not None:
        return str(options.unix)
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{host}:{options.port}"


def host_name(text: str) -> str:
    """The value of --host: an IPv6 address may be in brackets; a port belongs in --port."""
    if found := re.fullmatch(r"(\[[^]]*\]|[^:]*):([0-9]*)", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} includes a port; use --host {found[1]} --port {found[2] or 'PORT'}"
        )
    return text[1:-1] if re.fullmatch(r"\[.*\]", text) else text


def port_number(text: str) -> int:
    port = int(text) if text.isdecimal() else 0
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number from 1 to 65535")
    return port


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds greater than 0 and at most {LONGEST_TIMEOUT:g}"
        )
    return number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="tcpupper",
        description="Send text to a tcpupperd server and print its upper-case answer.",
        epilog="See tcpupper(1).",
    )
    parser.add_argument(
        "--host", type=host_name, help="name or address of the server (default: localhost)"
    )
    parser.add_argument("--port", type=port_number, help="its TCP port (default: 9999)")
    parser.add_argument("--unix", metavar="PATH", help="its Unix socket, instead of host and port")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="give up if the server makes no progress for this long (default: 10)",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {__version__}",
        help="show the version and exit",
    )
    parser.add_argument(
        "text",
        nargs="*",
        metavar="TEXT",
        help="words to send as one line (default: standard input)",
    )
    options = parser.parse(argv)
    if options.unix is not None and (options.host is not None or options.port is not None):
        parser.error("--unix replaces --host and --port: give one or the other")
    options.host = "localhost" if options.host is None else options.host
    options.port = options.port or 9999
    return options


def exchange(options: argparse.Namespace) -> None:
    # The connection would get the descriptor number of a closed standard stream.
    if sys.stdout is None:
        raise ClientError("standard output is closed")
    if sys.stdin is None and not options.text:
        raise ClientError("standard input is closed, and there is no TEXT")
    text = os.fsencode(" ".join(options.text) + "\n") if options.text else None
    name = server_name(options)
    with connect(options, name) as server:
        Exchange(server, name, text, options.timeout).run()


def end_as_filters_do() -> None:
    """Let SIGINT and SIGPIPE terminate the process silently, as with cat(1).

    The exit status then tells the shell the cause, and Ctrl-C works during a slow name lookup.
    If the shell ignores SIGINT for a background job, it stays ignored.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client; return 0 if all was answered, else 1. (The parser itself exits with 2.)"""
    end_as_filters_do()
    options = parse_arguments(argv)
    try:
        exchange(options)
    except ClientError as error:
        print(f"tcpupper: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
