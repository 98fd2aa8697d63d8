"""The command line program, from arguments to exit status."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from outlive import library
from outlive.activation import (
    PassedDescriptors,
    PassedError,
    keeps_descriptors,
    passed_descriptors,
)
from outlive.remedies import remedy
from tcpupperd import __version__, config_file
from tcpupperd.address import SERVICES
from tcpupperd.arguments import Parser
from tcpupperd.config import SETTINGS, Config
from tcpupperd.errors import ExpectedError
from tcpupperd.events import Event
from tcpupperd.host import background, messages
from tcpupperd.host.background import Background
from tcpupperd.host.manager import Notifier
from tcpupperd.host.sockets import ListenError, Listeners, named
from tcpupperd.output import write_output
from tcpupperd.processes import spares
from tcpupperd.processes.conflicts import cannot_check
from tcpupperd.processes.reloading import reload
from tcpupperd.processes.rollout import Rollout
from tcpupperd.processes.source import Source
from tcpupperd.processes.store import NAMES, Store
from tcpupperd.processes.supervisor import StartError, Supervisor
from tcpupperd.serving import fast_path
from tcpupperd.serving.server import UpperServer
from tcpupperd.settings import Setting

log = logging.getLogger(__name__)

#: The exit status for an error of the operating system that is not a bug: sysexits.h.
EX_OSERR = 71

#: The width of --help, in columns.
HELP_WIDTH = 79


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; returns its exit status."""
    background.open_standard_streams()
    arguments = parse(argv)
    is_command = bool(arguments.check or arguments.reload)
    dropped = Event.MESSAGES_DROPPED.fields()
    messages.set_up("info", os.environ, as_command=is_command, dropped=dropped)
    try:
        if arguments.check:
            check(arguments)
        elif arguments.reload:
            reload(arguments.reload)
        else:
            serve(arguments)
    except ExpectedError as error:
        for line in str(error).splitlines():
            log.critical("%s", line)
        return error.status
    except Exception as error:
        if not remedy(error):
            log.critical("internal error; please report this bug", exc_info=True)
            return 1
        log.critical("cannot continue: %s%s", error, remedy(error))
        return EX_OSERR
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Print that the configuration is valid, or raise ConfigError; with --verbose, print the
    configuration."""
    given = given_settings(arguments)
    lines = config_file.explain(arguments.config, given)
    text = "\n".join(lines) if arguments.verbose else "tcpupperd: the configuration is valid"
    write_output(os.fsencode(text + "\n"))
    if os.geteuid() == 0:
        for path in config_file.unreadable_for_others(arguments.config):
            log.warning(
                "%s: other users cannot read this, such as that of the service; make it readable"
                " (chmod 644 for a file, 755 for a folder)",
                path,
            )
    if unknown := cannot_check(config_file.load(arguments.config, given)):
        log.info("cannot be checked outside the unit: %s", ", ".join(unknown))


def serve(arguments: argparse.Namespace) -> None:
    """Serve until told to stop."""
    if arguments.daemonize:
        background.require_no_service_manager(os.environ)
    socket_unit = os.environ.get("TCPUPPERD_SOCKET_UNIT", "")
    passed = receive_descriptors(required=bool(socket_unit))
    notifier = Notifier(os.environ)
    with ExitStack() as stack:
        offered = keeps_descriptors(os.environ)
        store = Store(passed.stored, notifier, offered=offered, socket_unit=socket_unit)
        stack.enter_context(store)
        source = Source(arguments.config, given_settings(arguments), store)
        if passed.connected:
            serve_connected(passed.connected, source.load().config, notifier)
            return
        stage = None
        if arguments.daemonize:
            stage = stack.enter_context(
                Background(arguments.pid_file, arguments.user, arguments.group)
            )
        found = store.spares.complete(named(passed.listening), connections=store.restarts > 0)
        listeners = stack.enter_context(Listeners(found, bind=not socket_unit))
        rollout = Rollout(source, listeners)
        library.load()
        supervisor = Supervisor(rollout, notifier, store)
        if stage:
            ends = [store.channel.send_end, store.channel.receive_end]
            run_in_background(stage, supervisor, [*listeners.sockets(), *ends])
        else:
            supervisor.run(started=lambda: store.spares.keep(listeners))


def receive_descriptors(*, required: bool) -> PassedDescriptors:
    """What the service manager passed. Raises ListenError if it cannot be served."""
    stores = NAMES | spares.NAMES.keys()
    try:
        return passed_descriptors(os.environ, stores, names=SERVICES, required=required)
    except PassedError as error:
        raise ListenError(str(error)) from None


def run_in_background(
    stage: Background, supervisor: Supervisor, preserve: list[socket.socket]
) -> None:
    """Detach from the terminal and serve; report to the launcher whether the start succeeded."""
    stage.detach(preserve)
    messages.to_syslog()
    try:
        supervisor.run(started=stage.ready)
    except StartError as error:
        stage.failed(error.status, str(error))
        raise


def serve_connected(connected: list[socket.socket], settings: Config, notifier: Notifier) -> None:
    """Serve connections passed by the service manager (Accept=yes in systemd.socket(5)) until they
    are closed."""
    with UpperServer(config=settings) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.shutdown())
        for request in connected:
            with suppress(OSError):  # the client has already disconnected
                server.welcome(request, request.getpeername())
        notifier.ready()
        server.serve_forever()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 if it is invalid."""
    parser = Parser(
        prog="tcpupperd",
        description="Serve TCP clients, sending every line of text back in upper case.",
        epilog="See tcpupperd(8) and tcpupperd.toml(5).",
        # Without a width, argparse imports shutil and all its compression modules: 3 ms.
        formatter_class=partial(argparse.HelpFormatter, width=HELP_WIDTH),
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {__version__}, {fast_path.implementation}",
        help="show the version and whether the C module is in use, then exit",
    )
    # Absolute, because a daemon in the background changes its working directory.
    parser.add_argument(
        "--config", metavar="FILE", type=os.path.abspath, help="read settings from a TOML file"
    )
    add_commands(parser)
    add_background_options(parser)
    settings = parser.add_argument_group("settings (these override the configuration file)")
    for setting in SETTINGS:
        add_setting(settings, setting)
    arguments = parser.parse(argv)
    check_combinations(parser, arguments)
    return arguments


def add_commands(parser: Parser) -> None:
    """Add the options for commands that do not serve."""
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the configuration, report what is invalid, and exit",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="with --check: show the value of each setting and where it comes from",
    )
    parser.add_argument(
        "--reload",
        metavar="PID",
        type=process_id,
        help="make the daemon with this process ID reload, wait for the outcome, and exit",
    )


def add_background_options(parser: Parser) -> None:
    """Add --daemonize and the options that require it."""
    parser.add_argument("--daemonize", action="store_true", help="run in the background")
    for option, metavar, text in (
        ("--pid-file", "FILE", "write the process ID to this file"),
        ("--user", "NAME", "run as this user"),
        ("--group", "NAME", "run as this group instead of the user's own"),
    ):
        parser.add_argument(option, metavar=metavar, help=f"with --daemonize: {text}")


def check_combinations(parser: Parser, arguments: argparse.Namespace) -> None:
    """Check the options that depend on each other."""
    if not arguments.daemonize and (arguments.pid_file or arguments.user or arguments.group):
        parser.error("--pid-file, --user and --group require --daemonize")
    if arguments.verbose and not arguments.check:
        parser.error("--verbose requires --check")
    if arguments.reload and (arguments.check or arguments.daemonize):
        parser.error("--reload cannot be used together with --check or --daemonize")


def process_id(text: str) -> int:
    """The value of --reload."""
    pid = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not pid:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process ID")
    return pid


def add_setting(group: argparse._ArgumentGroup, setting: Setting[Any]) -> None:
    """Add the option for a setting; an option that takes a list may be repeated."""

    def value(text: str) -> Any:
        try:
            return setting.from_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    group.add_argument(
        setting.option,
        action="extend" if setting.is_list else "store",
        type=value,
        default=argparse.SUPPRESS,
        metavar=setting.metavar,
        help=f"{setting.help} (default: {setting.default_text or 'none'})",
    )


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line."""
    given = vars(arguments)
    return {setting.name: given[setting.name] for setting in SETTINGS if setting.name in given}
