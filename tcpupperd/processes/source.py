"""The source of the configuration: the file and the command line, or else the last good
configuration."""

from __future__ import annotations

import logging
import os
from typing import Any

from tcpupperd import config
from tcpupperd.config import Config, ConfigError
from tcpupperd.errors import ExpectedError
from tcpupperd.events import Event
from tcpupperd.processes.store import Store

log = logging.getLogger(__name__)

NO_FILE = 0, 0


class Source:
    """The file and the options, and the store with the last good configuration."""

    def __init__(self, path: str | None, options: dict[str, Any], store: Store) -> None:
        self.path = path
        self._options = options
        self._store = store
        self.trouble = ""  # for the status line, while the last good configuration is in use
        self._read = NO_FILE
        self.in_force = NO_FILE
        """The identity of the file that the running configuration comes from, or NO_FILE."""

    @property
    def instance(self) -> str:
        """The name of the instance, as in the names of its units: the name of the file."""
        name = os.path.basename(self.path or "tcpupperd")
        return name.removesuffix(".toml")

    def load(self) -> Config:
        """The configuration from the file and the options. Raises ConfigError if it is invalid."""
        self._read = identity(self.path)
        return config.load(self.path, self._options)

    @property
    def is_stale(self) -> bool:
        """Whether the file has changed since it was loaded."""
        return self.in_force not in (NO_FILE, identity(self.path))

    def last_good(self) -> Config | None:
        """The last good configuration, without settings that this version does not know; None if
        none is stored. Options override it."""
        if not self.path or self._store.configuration is None:
            return None
        found: dict[str, Any] = {}
        for line in self._store.configuration.splitlines():
            try:
                found |= config.parse(line, "the stored configuration")
            except ConfigError as error:  # stored by another version
                log.warning("ignoring a stored setting: %s", error)
        return Config(**(found | self._options))

    def fall_back(self, error: ExpectedError) -> Config:
        """Return the last good configuration in place of one that failed with an error. Raises the
        error if none is stored."""
        found = self.last_good()
        if not found:
            raise error
        self.complain(error)
        return found

    def complain(self, error: ExpectedError | str) -> None:
        """Log that the daemon is running with the last good configuration."""
        for line in str(error).splitlines():
            log.error("%s", line)
        log.error(
            "running with the last good configuration; correct %s and reload",
            self.path,
            extra=Event.FALLEN_BACK.fields(),
        )
        self.trouble = f"{self.path} is invalid; running with the last good configuration"

    def keep(self, good: Config) -> None:
        """Store a configuration that has proved good."""
        self.in_force = NO_FILE if self.trouble else self._read
        if self.path:
            self._store.keep_configuration(written(good))


def identity(path: str | None) -> tuple[int, int]:
    """The identity of a file, to detect whether it was changed or replaced: its inode and
    modification time, in nanoseconds. NO_FILE if there is no file."""
    try:
        found = os.stat(path or "")
    except OSError:
        return NO_FILE
    return found.st_ino, found.st_mtime_ns % 2**64  # numbers in the scoreboard are unsigned


def written(settings: Config) -> str:
    """A configuration as TOML, with one line for each setting that differs from its default. This
    lets another version skip lines that it does not know."""
    values = vars(settings)
    return "".join(
        f"{setting.name} = {config.as_toml(values[setting.name])}\n"
        for setting in config.SETTINGS
        if values[setting.name] != setting.default
    )
