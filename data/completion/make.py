"""Prints shell completion for tcpupperd and tcpupper: python3 data/completion/make.py bash|zsh.

The daemon's settings come from the table of settings, so exactly what it accepts is offered.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from inspect import getclosurevars
from pathlib import Path
from shlex import quote
from string import Template
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tcpupperd.config import SETTINGS  # noqa: E402
from tcpupperd.settings import Setting  # noqa: E402


class Option(NamedTuple):
    """An option of a command: its purpose, the kind of its value, and words to offer."""

    name: str
    help: str
    takes: str = ""  # "" (nothing), "file", "user", "group", "host", or a name for the value
    words: tuple[str, ...] = ()
    repeats: bool = False


HELP = Option("--help", "show all options and exit")
VERSION = Option("--version", "show the version and exit")

#: The daemon's options that are not settings.
DAEMON = (
    HELP,
    VERSION,
    Option("--config", "read settings from a TOML file", "file"),
    Option("--check", "check the configuration, report what is invalid, and exit"),
    Option("--reload", "make a daemon reload, and wait for the outcome", "process ID"),
    Option("--verbose", "with --check: show the value of each setting and where it comes from"),
    Option("--daemonize", "run in the background"),
    Option("--pid-file", "write the process ID to this file", "file"),
    Option("--user", "run as this user", "user"),
    Option("--group", "run as this group", "group"),
)

CLIENT = (
    HELP,
    VERSION,
    Option("--host", "name or address of the server", "host"),
    Option("--port", "TCP port of the server", "port", ("9999",)),
    Option("--unix", "Unix socket of the server, instead of a host and port", "file"),
    Option("--timeout", "give up after this long without progress", "seconds", ("10",)),
    Option("-4", "use only IPv4 addresses"),
    Option("-6", "use only IPv6 addresses"),
    Option("--bind", "connect from this local address", "address", ("127.0.0.1", "::1")),
    Option("--greeting", "expect a greeting line before the first answer"),
    Option("--verbose", "show the remote and local address of each connection"),
    Option("--lab", "give orders to a listener named lab"),
    Option("--ping", "send lines at intervals and report losses"),
    Option(
        "--count", "with --ping: stop after this many lines on each connection", "count", ("10",)
    ),
    Option("--interval", "with --ping: time between lines", "seconds", ("1",)),
    Option("--deadline", "with --ping: send no more lines after this long", "seconds", ("60",)),
    Option("--quiet", "with --ping: print only the summary"),
    Option("--problems", "with --ping: do not print the lines that were answered"),
    Option("--json", "with --ping: print only the summary, as JSON"),
    Option("--timestamps", "with --ping: begin each line with the time"),
    Option("--allow-disconnects", "with --ping: fail only if a line was lost"),
    Option("--connections", "with --ping: number of simultaneous connections", "count", ("1",)),
    Option("--check", "act as a monitoring plugin"),
    Option("--warning", "with --check: report WARNING above this time", "seconds", ("1",)),
    Option("--critical", "with --check: report CRITICAL above this time", "seconds", ("5",)),
)


def of_setting(setting: Setting[Any]) -> Option:
    """The option of a setting. If its check comes from `one_of`, the choices are offered; for
    others, the default shows what a value looks like."""
    words = getclosurevars(setting.check).nonlocals.get("choices", (setting.default_text,))
    if setting.is_switch:
        words = ("true", "false")
    takes = setting.metavar.lower()
    return Option(setting.option, setting.help, takes, words, setting.is_list)


def bash(options: Iterable[Option]) -> str:
    """The branches of a `case` of options that take a value."""
    actions = {
        "file": "_filedir",
        "user": 'COMPREPLY=($(compgen -u -- "$cur"))',
        "group": 'COMPREPLY=($(compgen -g -- "$cur"))',
        "host": '_known_hosts_real -- "$cur"',
    }
    return "\n".join(
        f"        {option.name})\n"
        f"            {actions.get(option.takes) or bash_words(option.words)}\n"
        "            return ;;"
        for option in options
        if option.takes
    )


def bash_words(words: Iterable[str]) -> str:
    """Offers the words that begin with the one at the cursor; bash splits words at colons."""
    offer = f"""COMPREPLY=($(compgen -W '{" ".join(words)}' -- "$cur"))"""
    return offer + ("""; __ltrim_colon_completions "$cur\"""" if ":" in "".join(words) else "")


def zsh(options: Iterable[Option]) -> str:
    """The specifications of `_arguments`."""
    return " \\\n".join(f"            {zsh_option(option)}" for option in options)


def zsh_option(option: Option) -> str:
    actions = {"file": "_files", "user": "_users", "group": "_groups", "host": "_hosts"}
    action = actions.get(option.takes) or "({})".format(" ".join(map(zsh_escape, option.words)))
    value = f":{option.takes}:{action}" if option.takes else ""
    name = f"{'*' * option.repeats}{option.name}{'=' if value else ''}"
    return quote(f"{name}[{zsh_escape(option.help)}]{value}")


def zsh_escape(text: str) -> str:
    """A text with the special characters of `_arguments` escaped."""
    for special in "\\:[]":
        text = text.replace(special, "\\" + special)
    return text


def main() -> None:
    writers = {"bash": bash, "zsh": zsh}
    parser = ArgumentParser(description="Print the shell completion for tcpupperd and tcpupper.")
    parser.add_argument("shell", choices=writers)
    shell = parser.parse_args().shell
    daemon = (*DAEMON, *map(of_setting, SETTINGS))
    values = writers[shell]
    print(
        Template((HERE / f"{shell}.in").read_text()).substitute(
            daemon_options=" ".join(option.name for option in daemon),
            daemon_values=values(daemon),
            client_options=" ".join(option.name for option in CLIENT),
            client_values=values(CLIENT),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
