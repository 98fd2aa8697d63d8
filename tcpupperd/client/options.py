"""The command line of ``tcpupper``."""

import argparse
import re
from collections.abc import Sequence

from tcpupperd import __version__
from tcpupperd.arguments import Parser
from tcpupperd.client.endpoint import Endpoint

LONGEST_TIMEOUT = 86400.0  # a day; far below what poll(2) can count in milliseconds


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
    options.endpoint = Endpoint(options.host or "localhost", options.port or 9999, options.unix)
    return options
