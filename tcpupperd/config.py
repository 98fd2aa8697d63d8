"""The table of settings, from which the file format, the command line and the completion are
derived."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from typing import Any, NamedTuple

from tcpupperd.address import parse_address, parse_network, split_service
from tcpupperd.errors import ExpectedError

#: The maximum size of a configuration file, in bytes. A mistyped path must not exhaust memory.
FILE_SIZE_MAX = 1 << 20

#: The maximum number of errors to report for a file. A binary file has one on every line.
ERRORS_MAX = 20

#: The maximum number of characters of a name or value in a message.
SHOWN_MAX = 80


class ConfigError(ExpectedError):
    """The configuration cannot be used. Each line of the message describes one error: where it is,
    what is wrong, and what is allowed."""

    status = 78  # EX_CONFIG of sysexits.h


class Setting(NamedTuple):
    """A row of the table. `check` returns the value to use, or raises a ValueError that says what
    the value must be."""

    name: str
    default: Any
    check: Callable[[Any], Any]
    metavar: str
    help: str

    @property
    def option(self) -> str:
        """The corresponding command line option."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_list(self) -> bool:
        """Whether the setting is a list."""
        return isinstance(self.default, tuple)

    @property
    def is_switch(self) -> bool:
        """Whether the setting is true or false."""
        return isinstance(self.default, bool)

    @property
    def is_text(self) -> bool:
        """Whether the setting is a text that is never a number."""
        return isinstance(self.default, str) and self.check is not workers

    @property
    def default_text(self) -> str:
        """The default in readable form."""
        if self.is_switch:
            return as_toml(self.default)
        return " ".join(self.default) if self.is_list else f"{self.default:{self._format}}"

    @property
    def _format(self) -> str:
        return "g" if isinstance(self.default, float) else ""


def whole(low: int, high: int) -> Callable[[Any], int]:
    """A whole number from `low` to `high`."""

    def check(value: Any) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise ValueError(f"must be a whole number from {low} to {high}")

    return check


def seconds(low: float, high: float) -> Callable[[Any], float]:
    """A number of seconds from `low` to `high`; fractions are allowed."""

    def check(value: Any) -> float:
        if type(value) in (int, float) and low <= value <= high:
            return float(value)
        raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")

    return check


def one_of(*choices: str) -> Callable[[Any], str]:
    """One of the words in `choices`."""

    def check(value: Any) -> str:
        if value in choices:
            return str(value)
        raise ValueError("must be one of " + ", ".join(f'"{choice}"' for choice in choices))

    return check


def switch(value: Any) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    raise ValueError("must be true or false")


WORKERS_MAX = 1024


def workers(value: Any) -> int | str:
    """ "auto" or a number of processes."""
    if value == "auto":
        return "auto"
    try:
        return whole(1, WORKERS_MAX)(value)
    except ValueError:
        raise ValueError(f'must be "auto" or a whole number from 1 to {WORKERS_MAX}') from None


def addresses(value: Any) -> tuple[str, ...]:
    """A list of one or more addresses to listen on."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        for item in value:
            parse_address(split_service(item)[1])
        return tuple(value)
    raise ValueError('must be a list of addresses, for example ["localhost:9999"]')


def networks(value: Any) -> tuple[str, ...]:
    """A list of IP addresses and networks."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        for item in value:
            parse_network(item)
        return tuple(value)
    raise ValueError('must be a list of addresses and networks, for example ["192.0.2.0/24"]')


#: The placeholders that a greeting may contain besides text.
PLACEHOLDERS = ("host", "instance", "worker", "client")

#: The maximum number of characters of a greeting.
GREETING_MAX = 200


def greeting(value: Any) -> str:
    """A line of text with placeholders."""
    if isinstance(value, str) and len(value) <= GREETING_MAX and value.isprintable():
        plain = re.sub(f"{{({'|'.join(PLACEHOLDERS)})}}", "", value)
        if not set("{}") & set(plain):
            return value
    names = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    raise ValueError(f"must be a line of up to {GREETING_MAX} characters; it may contain {names}")


DAY = 86400

#: The maximum of TCP_KEEPIDLE, in seconds; see tcp(7).
KEEPALIVE_MAX = 32767

SETTINGS = (
    Setting(
        "listen",
        ("localhost:9999",),
        addresses,
        "ADDRESS",
        "address to listen on: host:port, [::1]:port, port, /path or @abstract; prefix NAME="
        " selects a service other than upper; may be repeated; ignored if the service manager"
        " passes sockets",
    ),
    Setting(
        "proxy_from",
        ("127.0.0.0/8", "::1"),
        networks,
        "NETWORK",
        "address or network from which load balancers may connect to the proxy service; may be"
        " repeated",
    ),
    Setting(
        "workers",
        "auto",
        workers,
        "N",
        'number of worker processes; "auto" means one per usable CPU',
    ),
    Setting(
        "framing",
        "line",
        one_of("line", "none"),
        "KIND",
        '"line": answer each line once it is complete; "none": answer data as it arrives',
    ),
    Setting(
        "lines_per_connection",
        0,
        whole(0, 2**31 - 1),
        "N",
        "close a connection after this many lines (0 for no limit)",
    ),
    Setting(
        "max_line",
        65536,
        whole(1, 2**30),
        "BYTES",
        "answer lines longer than this in pieces",
    ),
    Setting(
        "greeting",
        "",
        greeting,
        "TEXT",
        "line to send to each client when it connects; {host}, {instance}, {worker} and {client}"
        " are expanded",
    ),
    Setting(
        "max_connections",
        10000,
        whole(1, 10**6),
        "N",
        "maximum number of open connections per worker; additional clients wait in the accept"
        " queue",
    ),
    Setting(
        "max_connections_per_source",
        0,
        whole(0, 10**6),
        "N",
        "maximum number of open connections per worker from one client address (one /64 for"
        " IPv6); any more are closed immediately (0 for no limit)",
    ),
    Setting(
        "idle_timeout",
        300.0,
        seconds(0, DAY),
        "SECONDS",
        "close a connection after this long without traffic (0 for never)",
    ),
    Setting(
        "line_timeout",
        60.0,
        seconds(0, DAY),
        "SECONDS",
        "close a connection if a line takes longer than this to arrive (0 for never)",
    ),
    Setting(
        "write_timeout",
        60.0,
        seconds(0, DAY),
        "SECONDS",
        "reset a connection if the client reads nothing of a pending answer for this long (0 for"
        " never)",
    ),
    Setting(
        "keepalive",
        60.0,
        seconds(0, KEEPALIVE_MAX),
        "SECONDS",
        "send keepalive probes to a client that has been silent for this long, and drop the"
        " connection if its host does not respond within the same time (0 for never)",
    ),
    Setting(
        "shutdown_delay",
        0.0,
        seconds(0, 3600),
        "SECONDS",
        "when told to stop, keep serving for this long while the agent tells load balancers to"
        " send new clients elsewhere (0 for no delay)",
    ),
    Setting(
        "drain_timeout",
        10.0,
        seconds(0, 3600),
        "SECONDS",
        "time allowed for delivering pending answers when the service stops; connections with"
        " undelivered answers are then reset",
    ),
    Setting(
        "log_level",
        "info",
        one_of("debug", "info", "warning", "error"),
        "LEVEL",
        "log messages of at least this severity; debug also logs each connection",
    ),
    Setting(
        "log_connections",
        False,
        switch,
        "BOOLEAN",
        "log why each connection ended and how much was received and sent",
    ),
)


class Config:
    """The values of the settings; immutable. A setting that is not given has its default.

    Raises ValueError if a value is invalid, and TypeError for an unknown setting.
    """

    listen: tuple[str, ...]
    proxy_from: tuple[str, ...]
    workers: int | str
    framing: str
    lines_per_connection: int
    max_line: int
    greeting: str
    max_connections: int
    max_connections_per_source: int
    idle_timeout: float
    line_timeout: float
    write_timeout: float
    keepalive: float
    shutdown_delay: float
    drain_timeout: float
    log_level: str
    log_connections: bool

    def __init__(self, **given: Any) -> None:
        values = {setting.name: setting.default for setting in SETTINGS}
        checked = {name: _check(name, value) for name, value in given.items()}
        self.__dict__.update(values | checked)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot change {name}: a configuration is immutable")

    def replace(self, **changed: Any) -> Config:
        """A copy with some settings changed."""
        return Config(**(vars(self) | changed))

    @property
    def worker_count(self) -> int:
        """The number of worker processes on this machine."""
        if self.workers == "auto":
            return min(WORKERS_MAX, len(os.sched_getaffinity(0)))
        return int(self.workers)


def load(path: str | None, options: dict[str, Any]) -> Config:
    """The configuration from a file, if one is given, and options, which override the file."""
    return Config(**((read_file(path) if path else {}) | options))


def explain(path: str | None, options: dict[str, Any]) -> list[str]:
    """The configuration that `load` would return, as the lines of a TOML file; a comment says
    where each value comes from."""
    text = read_text(path) if path else ""
    in_file = parse(text, str(path))
    values = vars(Config(**(in_file | options)))
    lines = []
    for name, value in values.items():
        origin = "command line" if name in options else "default"
        if name in in_file and name not in options:
            origin = _place("".join(map(_escaped, str(path))), _find_line(text, name))
        lines.append(f"{name} = {as_toml(value)}  # {origin}")
    return lines


def read_file(path: str) -> dict[str, Any]:
    """Read and check the settings in a file. Raises ConfigError if anything is invalid."""
    return parse(read_text(path), path)


def read_text(path: str) -> str:
    """The content of a file. Raises ConfigError if it cannot be read."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: not a regular file; specify a TOML file")
            content = file.read(FILE_SIZE_MAX + 1)
    except FileNotFoundError as error:
        remedy = "create it (in an empty file, every setting has its default)"
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {remedy}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > FILE_SIZE_MAX:
        raise ConfigError(f"{path}: larger than {FILE_SIZE_MAX} bytes; specify a TOML file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ConfigError(
            f"{path}:{line}: byte 0x{byte:02x} is not valid UTF-8; save the file as UTF-8"
        ) from None


def parse(text: str, name: str) -> dict[str, Any]:
    """Parse and check the settings in a text (TOML 1.0). Raises ConfigError with all errors;
    `name` is the name of the text in messages."""
    document, errors = _read_toml(text)
    settings = {}
    for key, value in document.items():
        try:
            settings[key] = _check(key, value)
        except (TypeError, ValueError) as error:
            errors.append((_find_line(text, key), str(error)))
    if errors:
        errors.sort(key=lambda error: error[0])
        lines = [f"{_place(name, line)}: {what}" for line, what in errors[:ERRORS_MAX]]
        if len(errors) > ERRORS_MAX:
            lines.append(f"{name}: only the first {ERRORS_MAX} errors are shown")
        raise ConfigError("\n".join(lines))
    return settings


def as_toml(value: Any) -> str:
    """A value in TOML syntax."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, str):
        return f'"{"".join(map(_escaped, value))}"'
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0")


def _escaped(character: str) -> str:
    if character.isascii() and character.isprintable() and character not in '"\\':
        return character
    return f"\\U{ord(character):08x}"


def from_text(setting: Setting, text: str) -> Any:
    """Parse and check the value of a command line option. Raises ValueError."""
    if setting.is_list:
        return setting.check([text])
    return setting.check(_of_type(setting, text))


def _of_type(setting: Setting, text: str) -> Any:
    """A value of the type of a setting, or the text if it does not have the form of one."""
    if setting.is_switch:
        return {"true": True, "false": False}.get(text, text)
    if setting.is_text:
        return text
    if re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?[0-9]+\.[0-9]+", text) else text


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without blocking, even if it is a named pipe without a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_toml(text: str) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """Parse a TOML text as far as possible; also return the syntax errors, each with its line.

    A line that is invalid on its own is skipped, and the rest is read. After any other error, such
    as an unclosed bracket, the meaning of the rest is unknown.
    """
    import tomllib  # without a configuration file, the daemon starts faster without it

    lines = text.split("\n")
    errors: list[tuple[int, str]] = []
    while len(errors) <= ERRORS_MAX:
        try:
            return tomllib.loads("\n".join(lines) + "\n"), errors
        except (ValueError, RecursionError) as error:
            line, what = _locate_syntax_error(str(error))
        errors.append((line, f"invalid TOML: {what}"))
        if not line or not (what.startswith("Cannot") or _is_wrong_alone(lines[line - 1])):
            break
        lines[line - 1] = ""
    return {}, errors


def _is_wrong_alone(line: str) -> bool:
    import tomllib

    try:
        tomllib.loads(line + "\n")
    except (ValueError, RecursionError):
        return True
    return False


def _locate_syntax_error(message: str) -> tuple[int, str]:
    """The line number in a message from tomllib, or 0, and the rest of the message."""
    found = re.fullmatch(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", message, re.DOTALL)
    return (int(found[2]), f"{found[1]} (column {found[3]})") if found else (0, message)


def _check(name: str, value: Any) -> Any:
    """The value to use for a setting. Raises ValueError if the value is invalid, and TypeError for
    an unknown setting."""
    for setting in SETTINGS:
        if setting.name == name:
            try:
                return setting.check(value)
            except ValueError as error:
                raise ValueError(f"{name} = {_shown(value)}: {error}") from None
    shown = name if name.isprintable() else as_toml(name)
    raise TypeError(f"{_cut(shown)}: unknown setting; {_hint(name)}")


def _find_line(text: str, name: str) -> int:
    """The number of the first line that appears to set a key, for use in messages; 0 if there is
    none."""
    key = re.escape(name)
    found = re.search(rf"^[ \t]*\[*[ \t]*[\"']?{key}\b", text, re.MULTILINE)
    return text.count("\n", 0, found.end()) + 1 if found else 0


def _place(path: str, line: int) -> str:
    return f"{path}:{line}" if line else path


def _shown(value: Any) -> str:
    """A value roughly in TOML syntax, shortened if it is long."""
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    except ValueError:  # Python converts at most 4300 digits
        return "a number too long to display"
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 3] + "..."


def _hint(name: str) -> str:
    from difflib import get_close_matches  # needed only here

    names = [setting.name for setting in SETTINGS]
    close = get_close_matches(name[:SHOWN_MAX], names, n=1)
    return f"did you mean {close[0]}?" if close else f"the settings are {', '.join(names)}"
