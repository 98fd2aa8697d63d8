"""The configuration file and its fragments, TOML 1.0."""

from __future__ import annotations

import os
import re
import stat
from typing import Any

from tcpupperd.config import Config, check
from tcpupperd.errors import ExpectedError
from tcpupperd.settings import as_toml, escaped

#: The folder of fragments, next to the configuration file.
FRAGMENTS = "conf.d"

#: The maximum size of a configuration file, in bytes. A mistyped path must not exhaust memory.
FILE_SIZE_MAX = 1 << 20

#: The maximum number of errors to report for a file. A binary file has one on every line.
ERRORS_MAX = 20


class ConfigError(ExpectedError):
    """The configuration cannot be used. Each line of the message describes one error: where it is,
    what is wrong, and what is allowed."""

    status = 78  # EX_CONFIG of sysexits.h


def load(path: str | None, options: dict[str, Any]) -> Config:
    """The configuration from a file and its fragments, if a file is given, and options, which
    override these."""
    found: dict[str, Any] = {}
    for _, _, in_file in _read_all(path):
        found |= in_file
    return Config(**(found | options))


def explain(path: str | None, options: dict[str, Any]) -> list[str]:
    """The configuration that `load` would return, as the lines of a TOML file; a comment says
    where each value comes from."""
    settings, origins = dict[str, Any](), dict[str, str]()
    for file, text, in_file in _read_all(path):
        settings |= in_file
        shown = "".join(map(escaped, file))
        origins |= {name: _place(shown, _find_line(text, name)) for name in in_file}
    origins |= dict.fromkeys(options, "command line")
    values = vars(Config(**(settings | options)))
    return [
        f"{name} = {as_toml(value)}  # {origins.get(name, 'default')}"
        for name, value in values.items()
    ]


def files(path: str | None) -> list[str]:
    """The configuration file and its fragments, in the order in which they are read. Raises
    ConfigError if the folder of the fragments cannot be read."""
    if not path:
        return []
    folder = os.path.join(os.path.dirname(path), FRAGMENTS)
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error.strerror}{_remedy(error)}") from None
    wanted = [name for name in names if name.endswith(".toml") and not name.startswith(".")]
    return [path, *(os.path.join(folder, name) for name in wanted)]


def _read_all(path: str | None) -> list[tuple[str, str, dict[str, Any]]]:
    """Each file with its content and its settings. Raises ConfigError with the errors of all."""
    found, errors = [], []
    for file in files(path):
        try:
            text = read_text(file)
            found.append((file, text, parse(text, file)))
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    return found


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
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{_remedy(error)}") from None
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


def unreadable_for_others(path: str | None) -> list[str]:
    """The files, and the folder of the fragments, that only their owner and group may read."""
    found = files(path)
    folders = {os.path.dirname(fragment) for fragment in found[1:]}
    return [one for one in [*folders, *found] if not os.stat(one).st_mode & stat.S_IROTH]


def _remedy(error: OSError) -> str:
    if not isinstance(error, PermissionError):
        return ""
    return "; the user of the daemon must have access (chmod 644 for a file, 755 for a folder)"


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without blocking, even if it is a named pipe without a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_toml(text: str, name: str) -> dict[str, Any]:
    """Parse a text. Raises ConfigError for an error of syntax, after which the rest could mean
    anything."""
    if text.startswith("\ufeff"):
        remedy = "save the file as UTF-8 without it"
        raise ConfigError(f"{_place(name, 1)}: begins with a byte order mark; {remedy}")
    import tomllib  # without a configuration file, the daemon starts faster without it

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        what, line = str(error), 0
    if found := re.fullmatch(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", what, re.DOTALL):
        what, line = f"{found[1]} (column {found[3]})", int(found[2])
    if what.startswith("Cannot overwrite a value") and (second := _find_second(text)):
        line, what = second
    raise ConfigError(f"{_place(name, line)}: invalid TOML: {what}{_open_list(text, line)}")


def _find_second(text: str) -> tuple[int, str] | None:
    """The line that appears to set a key for the second time, and what is wrong with it."""
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if key := re.match(r"""[ \t]*["']?([\w-]+)["']?[ \t]*=""", line):
            if key[1] in seen:
                return number, f"{key[1]} is already set in line {seen[key[1]]}; set it only once"
            seen[key[1]] = number
    return None


def _open_list(text: str, line: int) -> str:
    """A hint at the list in which an error was found, if it begins in an earlier line."""
    before = text.splitlines()[: line or None]
    begins = [number for number, one in enumerate(before, 1) if re.match(r"[^#]*=[ \t]*\[", one)]
    if not begins or begins[-1] == line or "]" in "\n".join(before[begins[-1] - 1 :]):
        return ""
    return f"; the list that begins in line {begins[-1]} is not closed"


def _find_line(text: str, name: str) -> int:
    """The number of the first line that appears to set a key, for use in messages; 0 if there is
    none."""
    key = re.escape(name)
    found = re.search(rf"^[ \t]*\[*[ \t]*[\"']?{key}\b", text, re.MULTILINE)
    return text.count("\n", 0, found.end()) + 1 if found else 0


def _place(path: str, line: int) -> str:
    return f"{path}:{line}" if line else path
