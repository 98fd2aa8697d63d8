"""The command: ``main()``. All exit statuses are decided here."""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from tcpupperd.client.endpoint import ends, reason
from tcpupperd.client.options import (
    CheckOptions,
    LabOptions,
    Options,
    PingOptions,
    parse_arguments,
)
from tcpupperd.client.plugin import UNKNOWN, report
from tcpupperd.errors import ExpectedError


def exchange(options: Options) -> int:
    if sys.stdin is None and not options.text:
        raise ExpectedError("standard input is closed and no TEXT was given")
    endpoint = options.endpoint
    with endpoint.connect(options.timeout) as server:
        if options.verbose:
            print(f"tcpupper: connected {ends(server)}", file=sys.stderr)
        if options.greeting:
            receive_greeting(server, endpoint.name)
        if options.text:
            send_text(server, options)
        elif sys.stdin.isatty() and sys.stdout.isatty() and find_spec("readline"):
            converse(server, options)
        else:
            filter_input(server, options)
    return 0


def receive_greeting(server: socket.socket, name: str) -> None:
    """Show the server's greeting on standard error."""
    from tcpupperd.client.greeting import Greeting

    greeting = Greeting(is_expected=True)
    while greeting.is_due:
        try:
            byte = server.recv(1)  # the rest is received elsewhere
        except OSError as error:
            raise ExpectedError(f"no greeting from {name}: {reason(error)}") from error
        if not byte:
            raise ExpectedError(f"{name} closed the connection without a greeting")
        greeting.strip(byte)
    print(f"tcpupper: greeting: {greeting.text}", file=sys.stderr)


def send_text(server: socket.socket, options: Options) -> None:
    text = os.fsencode(" ".join(options.text) + "\n")
    name, timeout = options.endpoint.name, options.timeout
    if isinstance(options, LabOptions):
        from tcpupperd.client.lab import LabOrder

        LabOrder(server, name, timeout).run_one(text)
    else:
        from tcpupperd.client.exchange import Exchange

        Exchange(server, name, text, timeout).run()


def converse(server: socket.socket, options: Options) -> None:
    name, timeout = options.endpoint.name, options.timeout
    if isinstance(options, LabOptions):
        from tcpupperd.client.lab_conversation import LabConversation

        LabConversation(server, name, timeout).run()
    else:
        from tcpupperd.client.conversation import Conversation

        Conversation(server, name, None, timeout).run()


def filter_input(server: socket.socket, options: Options) -> None:
    from tcpupperd.client.exchange import STDIN, Exchange
    from tcpupperd.client.progress import Progress
    from tcpupperd.output import STDOUT

    name, timeout = options.endpoint.name, options.timeout
    if isinstance(options, LabOptions):
        from tcpupperd.client.lab import LabExchange

        LabExchange(server, name, None, timeout).run()
        return
    with Progress(STDIN, STDOUT) as progress:
        Exchange(server, name, None, timeout, progress.show).run()


def run(options: Options) -> int:
    """Run in the selected mode, each of which imports only what it needs."""
    if isinstance(options, PingOptions):
        from tcpupperd.client.ping import Ping

        return 0 if Ping(options).run() else 1
    if isinstance(options, CheckOptions):
        from tcpupperd.client.check import check

        return check(options)
    return exchange(options)


def restore_default_signals() -> None:
    """Let SIGINT and SIGPIPE terminate the process silently, like cat(1).

    The exit status then tells the shell the cause, and Ctrl-C works during a slow name lookup.
    If the shell ignores SIGINT for a background job, it stays ignored.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client; return the exit status. (The parser exits with its own.)"""
    options = parse_arguments(argv)
    is_check = isinstance(options, CheckOptions)
    if not is_check:  # the exit status of a check reports only its result
        restore_default_signals()
    try:
        # The connection would get the descriptor number of a closed standard stream.
        if sys.stdout is None:
            raise ExpectedError("standard output is closed")
        return run(options)
    except KeyboardInterrupt:  # only in a check
        return report(UNKNOWN, "interrupted")
    except ExpectedError as error:
        print(f"tcpupper: {error}", file=sys.stderr)
        return UNKNOWN if is_check else error.status
