"""The settings: one row each, from which file, command line and documentation follow."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from typing import Any, NamedTuple

from tcpupperd.address import parse_address
from tcpupperd.errors import ExpectedError

#: Bytes of a configuration file that are read at the most. A wrong path must not fill the memory.
FILE_SIZE_MAX = 1 << 20


class ConfigError(ExpectedError):
    """The configuration cannot be used; the message says where, what, and what would be right."""

    status = 78  # EX_CONFIG of sysexits.h


class Setting(NamedTuple):
    """A row of the table. `check` returns the value to use, or raises ValueError saying what the
    value must be."""

    name: str
    default: Any
    check: Callable[[Any], Any]
    metavar: str
    help: str

    @property
    def option(self) -> str:
        """The command line option of the same meaning."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_list(self) -> bool:
        """Whether it has several values."""
        return isinstance(self.default, tuple)

    @property
    def default_text(self) -> str:
        """The default for people."""
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
    """One of some words."""

    def check(value: Any) -> str:
        if value in choices:
            return str(value)
        raise ValueError("must be one of " + ", ".join(f'"{choice}"' for choice in choices))

    return check


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
    """A list of addresses to listen on, of which there is at least one."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        for item in value:
            parse_address(item)
        return tuple(value)
    raise ValueError('must be a list of addresses, for example ["localhost:9999"]')


DAY = 86400

SETTINGS = (
    Setting(
        "listen",
        ("localhost:9999",),
        addresses,
        "ADDRESS",
        "where to listen: host:port, [::1]:port, port, /path or @abstract; several are allowed;"
        " ignored when a service manager passes sockets in",
    ),
    Setting("workers", "auto", workers, "N", "processes; auto is the number of usable CPUs"),
    Setting(
        "framing",
        "line",
        one_of("line", "none"),
        "KIND",
        "line: answer each line when it is complete; none: answer whatever arrives at once",
    ),
    Setting(
        "lines_per_connection",
        0,
        whole(0, 2**31 - 1),
        "N",
        "lines after which a connection is closed; 0 is without end",
    ),
    Setting(
        "max_line",
        65536,
        whole(1, 2**30),
        "BYTES",
        "what is held of an unfinished line before it is answered in pieces",
    ),
    Setting(
        "max_connections",
        10000,
        whole(1, 10**6),
        "N",
        "open connections of a worker; more wait in the kernel's queue",
    ),
    Setting(
        "max_connections_per_source",
        0,
        whole(0, 10**6),
        "N",
        "the same for one client address (IPv6: /64 network); more are closed at once;"
        " 0 is without limit",
    ),
    Setting(
        "idle_timeout",
        300.0,
        seconds(0, DAY),
        "SECONDS",
        "how long a connection may go without a byte; 0 is for ever",
    ),
    Setting(
        "line_timeout",
        60.0,
        seconds(0, DAY),
        "SECONDS",
        "how long a line may take from its first byte to its newline; 0 is for ever",
    ),
    Setting(
        "write_timeout",
        60.0,
        seconds(0, DAY),
        "SECONDS",
        "how long a client may take no answer; 0 is for ever",
    ),
    Setting(
        "keepalive",
        60.0,
        seconds(0, DAY),
        "SECONDS",
        "silence after which the kernel asks a client, four times in as long again, whether its"
        " machine is still there; 0 is never",
    ),
    Setting(
        "drain_timeout",
        10.0,
        seconds(0, 3600),
        "SECONDS",
        "how long answers get to leave when the service stops",
    ),
    Setting(
        "log_level",
        "info",
        one_of("debug", "info", "warning", "error"),
        "LEVEL",
        "least important messages to log; connections and data are debug",
    ),
)


class Config:
    """The settings' values; immutable. What is not given has its default.

    Values are taken as they are: `load` and the command line check them first.
    """

    listen: tuple[str, ...]
    workers: int | str
    framing: str
    lines_per_connection: int
    max_line: int
    max_connections: int
    max_connections_per_source: int
    idle_timeout: float
    line_timeout: float
    write_timeout: float
    keepalive: float
    drain_timeout: float
    log_level: str

    def __init__(self, **given: Any) -> None:
        values = {setting.name: setting.default for setting in SETTINGS}
        if unknown := given.keys() - values.keys():
            raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
        self.__dict__.update(values | given)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot change {name}: a configuration is immutable")

    @property
    def worker_count(self) -> int:
        """How many processes "workers" means on this machine."""
        return len(os.sched_getaffinity(0)) if self.workers == "auto" else int(self.workers)


def load(path: str | None, options: dict[str, Any]) -> Config:
    """The configuration from a file, if one is named, and options that win over it."""
    return Config(**((read_file(path) if path else {}) | options))


def read_file(path: str) -> dict[str, Any]:
    """The settings of a TOML file (TOML 1.0), checked; ConfigError if there is anything wrong."""
    import tomllib  # a run without a file starts sooner without it

    text = _read_text(path)
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(_locate_syntax_error(path, str(error))) from None
    return {name: _check(path, text, name, value) for name, value in document.items()}


def from_text(setting: Setting, text: str) -> Any:
    """The value of a command line option, checked; ValueError says what it must be."""
    if setting.is_list:
        return setting.check([text])
    if re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        return setting.check(int(text))
    if re.fullmatch(r"[+-]?[0-9]+\.[0-9]+", text):
        return setting.check(float(text))
    return setting.check(text)


def _read_text(path: str) -> str:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: is not a regular file; name a TOML file")
            content = file.read(FILE_SIZE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > FILE_SIZE_MAX:
        raise ConfigError(f"{path}: is larger than {FILE_SIZE_MAX} bytes; name a TOML file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ConfigError(
            f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save as UTF-8"
        ) from None


def _open_at_once(path: str, flags: int) -> int:
    """To open a named pipe must not wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _locate_syntax_error(path: str, message: str) -> str:
    found = re.fullmatch(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", message, re.DOTALL)
    if not found:
        return f"{path}: is not TOML: {message}"
    return f"{path}:{found[2]}: is not TOML: {found[1]} (column {found[3]})"


def _check(path: str, text: str, name: str, value: Any) -> Any:
    for setting in SETTINGS:
        if setting.name == name:
            try:
                return setting.check(value)
            except ValueError as error:
                where = _find_line(path, text, name)
                raise ConfigError(f"{where}: {name} = {_shown(value)}: {error}") from None
    raise ConfigError(f"{_find_line(path, text, name)}: {name}: {_unknown(name)}")


def _find_line(path: str, text: str, name: str) -> str:
    """Where a key stands, for people: the first line that looks like it."""
    key = re.escape(name)
    found = re.search(rf"^[ \t]*\[*[ \t]*[\"']?{key}\b", text, re.MULTILINE)
    return f"{path}:{text.count(chr(10), 0, found.end()) + 1}" if found else path


def _shown(value: Any) -> str:
    """A value as TOML writes it, cut if long."""
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    except ValueError:  # Python writes out no more than 4300 digits
        return "a number of very many digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _unknown(name: str) -> str:
    from difflib import get_close_matches  # only ever needed here

    names = [setting.name for setting in SETTINGS]
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    return f"no such setting; {hint}"
