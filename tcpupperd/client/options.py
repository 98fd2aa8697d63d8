"""The command line of ``tcpupper``. An option may mean one thing with --ping, another without."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from tcpupperd import __version__
from tcpupperd.arguments import Parser
from tcpupperd.client.endpoint import Endpoint

LONGEST_TIMEOUT = 86400.0  # a day; far below what poll(2) can count in milliseconds
SHORTEST_INTERVAL = 0.001  # what epoll_wait(2) can count


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


def positive(text: str) -> int:
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if not number:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 999999999")
    return number


def seconds(text: str) -> float:
    number = decimal(text)
    if not 0 < number <= LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds greater than 0 and at most {LONGEST_TIMEOUT:g}"
        )
    return number


def interval(text: str) -> float:
    number = decimal(text)
    if not SHORTEST_INTERVAL <= number <= LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds from {SHORTEST_INTERVAL:g} to"
            f" {LONGEST_TIMEOUT:g}"
        )
    return number


def decimal(text: str) -> float:
    """A number; 0 if it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    options_end = words.index("--") if "--" in words else len(words)
    mode = "--ping" if "--ping" in words[:options_end] else ""
    parser = Parser(
        prog="tcpupper",
        description=DESCRIPTIONS[mode],
        epilog="See tcpupper(1).",
    )
    add_server_options(parser)
    MODES[mode](parser)
    options = parser.parse(words)
    if options.unix is not None and (options.host is not None or options.port is not None):
        parser.error("--unix replaces --host and --port: give one or the other")
    options.endpoint = Endpoint(options.host or "localhost", options.port or 9999, options.unix)
    return options


def add_server_options(parser: Parser) -> None:
    """The options that any use of the client has."""
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {__version__}",
        help="show the version and exit",
    )
    parser.add_argument(
        "--host", type=host_name, help="name or address of the server (default: localhost)"
    )
    parser.add_argument("--port", type=port_number, help="its TCP port (default: 9999)")
    parser.add_argument("--unix", metavar="PATH", help="its Unix socket, instead of host and port")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the address of each connection"
    )


def add_text_options(parser: Parser) -> None:
    parser.set_defaults(mode="exchange")
    add_timeout(parser, "give up if the server makes no progress for this long (default: 10)")
    parser.add_argument(
        "text",
        nargs="*",
        metavar="TEXT",
        help="words to send as one line (default: standard input)",
    )
    parser.add_argument(
        "--ping", action="store_true", help="another use: see 'tcpupper --ping --help'"
    )


def add_ping_options(parser: Parser) -> None:
    parser.set_defaults(mode="ping")
    parser.add_argument("--ping", action="store_true", help="what you see the options of")
    parser.add_argument(
        "-c", "--count", type=positive, help="end after so many lines on each connection"
    )
    parser.add_argument(
        "-i",
        "--interval",
        type=interval,
        default=1.0,
        metavar="SECONDS",
        help="time between the lines of a connection (default: 1)",
    )
    parser.add_argument(
        "-w", "--deadline", type=seconds, metavar="SECONDS", help="end after this long"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print nothing but the first line and summary"
    )
    parser.add_argument(
        "--connections",
        type=positive,
        default=1,
        metavar="COUNT",
        help="use so many connections at once (default: 1)",
    )
    add_timeout(parser, "a line without an answer for this long is lost (default: 10)")


def add_timeout(parser: Parser, meaning: str) -> None:
    parser.add_argument("--timeout", type=seconds, default=10.0, metavar="SECONDS", help=meaning)


MODES: dict[str, Callable[[Parser], None]] = {"": add_text_options, "--ping": add_ping_options}
DESCRIPTIONS = {
    "": "Send text to a tcpupperd server and print its upper-case answer.",
    "--ping": "Send lines to a tcpupperd server at intervals, and see whether any is lost.",
}
