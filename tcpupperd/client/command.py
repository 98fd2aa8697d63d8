"""The command: ``main()``. It alone decides the exit status."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from tcpupperd.client.endpoint import ends
from tcpupperd.client.options import parse_arguments
from tcpupperd.client.plugin import UNKNOWN, report
from tcpupperd.errors import ExpectedError


def exchange(options: argparse.Namespace) -> int:
    from tcpupperd.client.exchange import Exchange

    if sys.stdin is None and not options.text:
        raise ExpectedError("standard input is closed, and there is no TEXT")
    text = os.fsencode(" ".join(options.text) + "\n") if options.text else None
    endpoint = options.endpoint
    with endpoint.connect(options.timeout) as server:
        if options.verbose:
            print(f"tcpupper: connected {ends(server)}", file=sys.stderr)
        Exchange(server, endpoint.name, text, options.timeout).run()
    return 0


def ping(options: argparse.Namespace) -> int:
    from tcpupperd.client.ping import Ping

    return 0 if Ping(options).run() else 1


def check(options: argparse.Namespace) -> int:
    from tcpupperd.client.check import check

    return check(options)


#: Each use of the client imports only what it needs.
MODES = {"exchange": exchange, "ping": ping, "check": check}


def end_as_filters_do() -> None:
    """Let SIGINT and SIGPIPE terminate the process silently, as with cat(1).

    The exit status then tells the shell the cause, and Ctrl-C works during a slow name lookup.
    If the shell ignores SIGINT for a background job, it stays ignored.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client; return the exit status. (The parser itself exits with its own.)"""
    options = parse_arguments(argv)
    if options.mode != "check":  # whose status says only what it has found out
        end_as_filters_do()
    try:
        # The connection would get the descriptor number of a closed standard stream.
        if sys.stdout is None:
            raise ExpectedError("standard output is closed")
        return MODES[options.mode](options)
    except KeyboardInterrupt:  # only of a check
        return report(UNKNOWN, "interrupted")
    except ExpectedError as error:
        print(f"tcpupper: {error}", file=sys.stderr)
        return UNKNOWN if options.mode == "check" else error.status
