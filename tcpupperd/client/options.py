"""The command line of ``tcpupper``. An option may have one meaning with --ping and another with
--check."""

from __future__ import annotations

import argparse
import math
import re
import socket
import sys
from collections.abc import Sequence

from tcpupperd import __version__
from tcpupperd.arguments import Parser
from tcpupperd.client.endpoint import Endpoint
from tcpupperd.client.plugin import PluginParser

TYPE_CHECKING = False  # as in typing, which the client does not import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

LONGEST_TIMEOUT = 86400.0  # a day; far below what poll(2) can count in milliseconds
LAB_TIMEOUT = 3700.0
SHORTEST_INTERVAL = 0.001  # what epoll_wait(2) can count


class Options:
    """The options of a filter and of a conversation, which the other modes also have."""

    def __init__(self, values: argparse.Namespace) -> None:
        self.endpoint: Final[Endpoint] = endpoint(values)
        self.timeout: Final[float] = values.timeout
        self.greeting: Final[bool] = values.greeting
        self.verbose: Final[bool] = values.verbose
        self.text: Final[list[str]] = values.text


class LabOptions(Options):
    """The options of --lab."""


class PingOptions(Options):
    """The options of --ping."""

    def __init__(self, values: argparse.Namespace) -> None:
        super().__init__(values)
        self.count: Final[int | None] = values.count
        self.interval: Final[float] = values.interval
        self.deadline: Final[float | None] = values.deadline
        self.connections: Final[int] = values.connections
        self.allow_disconnects: Final[bool] = values.allow_disconnects
        self.show: Final[str] = values.show
        self.timestamps: Final[bool] = values.timestamps


class CheckOptions(Options):
    """The options of --check."""

    def __init__(self, values: argparse.Namespace) -> None:
        super().__init__(values)
        self.warning: Final[float] = values.warning
        self.critical: Final[float] = values.critical


def host_name(text: str) -> str:
    """The value of --host. An IPv6 address may be in brackets; a port belongs in --port."""
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


def local_address(text: str) -> tuple[int, tuple[object, ...]]:
    """The value of --bind: the family, and the argument for `socket.bind`."""
    bare = text[1:-1] if re.fullmatch(r"\[.*\]", text) else text
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    try:
        socket.inet_pton(family, bare.partition("%")[0])  # because getaddrinfo(3) accepts 127.1
        [found] = socket.getaddrinfo(
            bare, 0, family, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except OSError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None
    return family, found[4]


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
    """A number; 0 if the text is not a number."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def parse_arguments(argv: Sequence[str] | None) -> Options:
    """The options; exits with status 2, or 3 with --check, if the command line is invalid."""
    words = list(sys.argv[1:] if argv is None else argv)
    options_end = words.index("--") if "--" in words else len(words)
    chosen = [mode for mode in MODES if f"--{mode}" in words[:options_end]]
    mode = chosen[-1] if chosen else "exchange"
    options_class, add_options = MODES[mode]
    parser = (PluginParser if mode == "check" else Parser)(
        prog=" ".join(["tcpupper", *(f"--{one}" for one in chosen[-1:])]),
        description=DESCRIPTIONS[mode],
        epilog="See tcpupper(1).",
    )
    if len(chosen) > 1:
        parser.error(f"--{chosen[0]} and --{chosen[1]} cannot be used together")
    parser.set_defaults(mode=mode)
    add_options(parser)
    values = parser.parse(words)
    check_combinations(parser, values)
    return options_class(values)


def endpoint(values: argparse.Namespace) -> Endpoint:
    family, source = values.bind or (values.family, None)
    port = values.port or values.default_port
    return Endpoint(values.host or "localhost", port, values.unix, family, source)


def check_combinations(parser: Parser, values: argparse.Namespace) -> None:
    """Check the options that depend on each other."""
    if values.unix is not None and (values.host is not None or values.port is not None):
        parser.error("--unix cannot be used together with --host or --port")
    if values.unix is not None and (values.family or values.bind):
        parser.error("-4, -6 and --bind apply to IP addresses and cannot be used with --unix")
    if values.bind and values.family not in (socket.AF_UNSPEC, values.bind[0]):
        parser.error("the --bind address does not belong to the family selected with -4 or -6")
    if values.mode in ("ping", "check") and values.text:
        wrong = values.text[0]
        parser.error(f"unexpected argument: {wrong!r}; use --host {wrong} to specify the server")
    if values.mode == "check" and values.critical < values.warning < math.inf:
        parser.error(
            f"--warning {values.warning:g} has no effect, because --critical is only"
            f" {values.critical:g}"
        )


def add_server_options(parser: Parser, timeout: str, *, short: bool = False) -> None:
    """The options for a server that answers in upper case; `timeout` describes --timeout. `short`
    adds the short options that plugins have."""
    add_common_options(parser, timeout, short=short)
    parser.add_argument(
        "--greeting", action="store_true", help="expect a greeting line before the first answer"
    )


def add_common_options(
    parser: Parser, timeout: str, *, short: bool = False, port: int = 9999, longest: float = 10.0
) -> None:
    """The options of every mode, with the defaults of --port and --timeout."""
    parser.add_argument(
        *(["-V"] if short else []),
        "--version",
        action="version",
        version=f"tcpupper {__version__}",
        help="show the version and exit",
    )
    add_address_options(parser, port)
    parser.add_argument(
        *(["-t"] if short else []),
        "--timeout",
        type=seconds,
        default=longest,
        metavar="SECONDS",
        help=f"{timeout} (default: {longest:g})",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show the remote and local address of each connection",
    )


def add_address_options(parser: Parser, port: int) -> None:
    """The options for the address of the server and for the local address."""
    parser.set_defaults(default_port=port)
    parser.add_argument(
        "-H",
        "--host",
        type=host_name,
        help="name or address of the server (default: localhost)",
    )
    parser.add_argument(
        "-p",
        "--port",
        type=port_number,
        help=f"TCP port of the server (default: {port})",
    )
    parser.add_argument(
        "--unix", metavar="PATH", help="Unix socket of the server, instead of a host and port"
    )
    families = parser.add_mutually_exclusive_group()
    for option, family in (("-4", socket.AF_INET), ("-6", socket.AF_INET6)):
        families.add_argument(
            option,
            dest="family",
            action="store_const",
            const=family,
            default=socket.AF_UNSPEC,
            help=f"use only IPv{option[1]} addresses",
        )
    # A number such as -5 remains TEXT, as it was before there was -4.
    parser._has_negative_number_optionals.clear()
    parser.add_argument(
        "--bind", type=local_address, metavar="ADDRESS", help="connect from this local address"
    )


def add_exchange_options(parser: Parser) -> None:
    add_server_options(parser, "give up if the server makes no progress for this long")
    purposes = {
        "ping": "send lines at intervals and report losses",
        "check": "act as a monitoring plugin",
        "lab": "give orders to a listener named lab",
    }
    for mode, purpose in purposes.items():
        parser.add_argument(
            f"--{mode}",
            action="store_true",
            help=f"{purpose}; see 'tcpupper --{mode} --help'",
        )
    parser.add_argument(
        "text",
        nargs="*",
        metavar="TEXT",
        help="words to send as one line (default: read standard input)",
    )


def add_lab_options(parser: Parser) -> None:
    parser.set_defaults(greeting=False)
    parser.add_argument("--lab", action="store_true", help=argparse.SUPPRESS)
    add_common_options(
        parser,
        "give up if the server makes no progress for this long; no order takes longer",
        port=9992,
        longest=LAB_TIMEOUT,
    )
    parser.add_argument(
        "text",
        nargs="*",
        metavar="ORDER",
        help="words to send as one order (default: read orders from standard input)",
    )


def add_mode(parser: Parser, option: str) -> None:
    """The option that has selected this mode, and the argument in which people expect to name the
    server."""
    parser.add_argument(option, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("text", nargs="*", help=argparse.SUPPRESS)


def add_ping_options(parser: Parser) -> None:
    add_mode(parser, "--ping")
    parser.add_argument(
        "-c",
        "--count",
        type=positive,
        help="stop after sending this many lines on each connection",
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
        "-w",
        "--deadline",
        type=seconds,
        metavar="SECONDS",
        help="send no more lines after this long, and wait for outstanding answers",
    )
    add_output_options(parser)
    parser.add_argument(
        "--allow-disconnects",
        action="store_true",
        help="do not fail because a connection ended, but only if a line was lost",
    )
    parser.add_argument(
        "--connections",
        type=positive,
        default=1,
        metavar="COUNT",
        help="use this many connections simultaneously (default: 1)",
    )
    add_server_options(parser, "count a line as lost if it is not answered within this time")


def add_output_options(parser: Parser) -> None:
    """What a ping prints."""
    parser.add_argument(
        "-D", "--timestamps", action="store_true", help="begin each line with the time (Unix time)"
    )
    parser.set_defaults(show="all")
    shown = parser.add_mutually_exclusive_group()
    for options, show, text in (
        (["-q", "--quiet"], "summary", "print only the first line and the summary"),
        (["--problems"], "problems", "do not print the lines that were answered"),
        (["--json"], "json", "print only the summary, as a JSON object"),
    ):
        shown.add_argument(*options, dest="show", action="store_const", const=show, help=text)


def add_check_options(parser: Parser) -> None:
    add_mode(parser, "--check")
    for letter, state in (("-w", "warning"), ("-c", "critical")):
        parser.add_argument(
            letter,
            f"--{state}",
            type=seconds,
            default=math.inf,
            metavar="SECONDS",
            help=f"report {state.upper()} if the answer takes longer than this",
        )
    add_server_options(
        parser, "report CRITICAL if there is no answer within this time", short=True
    )


#: For each mode, the class of its options, and what adds them to the parser.
MODES: dict[str, tuple[type[Options], Callable[[Parser], None]]] = {
    "exchange": (Options, add_exchange_options),
    "ping": (PingOptions, add_ping_options),
    "check": (CheckOptions, add_check_options),
    "lab": (LabOptions, add_lab_options),
}
DESCRIPTIONS = {
    "exchange": "Send text to a tcpupperd server and print its upper-case answer.",
    "ping": "Send lines to a tcpupperd server at intervals and report any that are lost.",
    "check": "Check a tcpupperd server, as a monitoring plugin.",
    "lab": "Give orders to the lab listener of a tcpupperd server, and print its answers.",
}
