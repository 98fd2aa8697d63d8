"""The configuration file, TOML 1.0."""

from __future__ import annotations

import os
import re
import stat
from typing import Any

from tcpupperd.config import Config, check
from tcpupperd.errors import ExpectedError
from tcpupperd.settings import as_toml, escaped

#: The maximum size of a configuration file, in bytes. A mistyped path must not exhaust memory.
FILE_SIZE_MAX = 1 << 20

#: The maximum number of errors to report for a file. A binary file has one on every line.
ERRORS_MAX = 20


class ConfigError(ExpectedError):
    """The configuration cannot be used. Each line of the message describes one error: where it is,
    what is wrong, and what is allowed."""

    status = 78  # EX_CONFIG of sysexits.h


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
            origin = _place("".join(map(escaped, str(path))), _find_line(text, name))
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
    """Parse and check the settings in a text. Raises ConfigError with the errors of all settings,
    or with the first error of syntax; `name` is the name of the text in messages."""
    settings, errors = {}, []
    for key, value in _read_toml(text, name).items():
        try:
            settings[key] = check(key, value)
        except (TypeError, ValueError) as error:
            errors.append((_find_line(text, key), str(error)))
    if errors:
        errors.sort(key=lambda error: error[0])
        lines = [f"{_place(name, line)}: {what}" for line, what in errors[:ERRORS_MAX]]
        if len(errors) > ERRORS_MAX:
            lines.append(f"{name}: only the first {ERRORS_MAX} errors are shown")
        raise ConfigError("\n".join(lines))
    return settings


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without blocking, even if it is a named pipe without a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_toml(text: str, name: str) -> dict[str, Any]:
    """Parse a text. Raises ConfigError for an error of syntax, after which the rest could mean
    anything."""
    import tomllib  # without a configuration file, the daemon starts faster without it

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        what, line = str(error), 0
    if found := re.fullmatch(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", what, re.DOTALL):
        what, line = f"{found[1]} (column {found[3]})", int(found[2])
    raise ConfigError(f"{_place(name, line)}: invalid TOML: {what}")


def _find_line(text: str, name: str) -> int:
    """The number of the first line that appears to set a key, for use in messages; 0 if there is
    none."""
    key = re.escape(name)
    found = re.search(rf"^[ \t]*\[*[ \t]*[\"']?{key}\b", text, re.MULTILINE)
    return text.count("\n", 0, found.end()) + 1 if found else 0


def _place(path: str, line: int) -> str:
    return f"{path}:{line}" if line else path
