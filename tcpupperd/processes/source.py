"""The source of the configuration: the file and the command line, or else the last good
configuration."""

from __future__ import annotations

import logging
import os
from typing import Any

from tcpupperd import config_file
from tcpupperd.config import SETTINGS, Config
from tcpupperd.config_file import ConfigError
from tcpupperd.errors import ExpectedError
from tcpupperd.events import Event
from tcpupperd.processes.generation import NO_FILE, Generation
from tcpupperd.processes.store import Store
from tcpupperd.settings import as_toml

log = logging.getLogger(__name__)


class Source:
    """The file and the options, and the store with the last good configuration."""

    def __init__(self, path: str | None, options: dict[str, Any], store: Store) -> None:
        self.path = path
        self._options = options
        self._store = store
        self._tried = NO_FILE  # the identity of the file when it was last read

    @property
    def instance(self) -> str:
        """The name of the instance, as in the names of its units: that of the file."""
        name = os.path.basename(self.path or "tcpupperd")
        return name.removesuffix(".toml")

    def load(self) -> Generation:
        """The configuration from the file and the options. Raises ConfigError if it is invalid."""
        self._tried = file_identity(self.path)
        return generation_of(config_file.load(self.path, self._options), self._tried)

    def last_good(self) -> Generation | None:
        """The last good configuration, without settings that this version does not know; None if
        none is stored. Options override it."""
        if not self.path or self._store.configuration is None:
            return None
        found: dict[str, Any] = {}
        for line in self._store.configuration.splitlines():
            try:
                found |= config_file.parse(line, "the stored configuration")
            except ConfigError as error:  # stored by another version
                log.warning("ignoring a stored setting: %s", error)
        problem = f"{self.path} is invalid; running with the last good configuration"
        return generation_of(Config(**(found | self._options)), NO_FILE, problem)

    def fall_back(self, error: ExpectedError) -> Generation:
        """Return the last good configuration in place of one that failed with an error. Raises the
        error if none is stored."""
        found = self.last_good()
        if not found:
            raise error
        self.log_fallback(error)
        return found

    def log_fallback(self, error: ExpectedError | str) -> None:
        """Log why the last good configuration is in use."""
        for line in str(error).splitlines():
            log.error("%s", line)
        log.error(
            "running with the last good configuration; correct %s and reload",
            self.path,
            extra=Event.LAST_GOOD_IN_USE.fields(),
        )

    def keep(self, good: Generation) -> None:
        """Store a configuration that works."""
        if self.path:
            self._store.keep_configuration(good.text)

    def has_changed_on_disk(self, generation: Generation) -> bool:
        """Whether the file has changed since this generation was loaded from it, and since the
        last reload, which may have failed."""
        if generation.file == NO_FILE:
            return False
        return file_identity(self.path) not in (generation.file, self._tried)


def generation_of(settings: Config, file: tuple[int, int], problem: str = "") -> Generation:
    """The generation with these settings."""
    resolved = settings.replace(workers=settings.worker_count)
    return Generation(resolved, to_toml(settings), file, problem)


def file_identity(path: str | None) -> tuple[int, int]:
    """What shows whether the file or one of its fragments was changed or replaced: the inode of
    the file, and a digest of the inodes and the times of the last changes of the contents.
    NO_FILE if one of them cannot be examined."""
    try:
        found = [os.stat(file) for file in config_file.files(path)]
    except (OSError, ConfigError):
        return NO_FILE
    if not found:
        return NO_FILE
    digest = hash(tuple((one.st_ino, one.st_mtime_ns) for one in found))
    return found[0].st_ino, digest % 2**64  # the scoreboard has no sign


def to_toml(settings: Config) -> str:
    """A configuration as TOML, with one line for each setting that differs from its default, so
    that another version can skip the lines that it does not know."""
    values = vars(settings)
    return "".join(
        f"{setting.name} = {as_toml(values[setting.name])}\n"
        for setting in SETTINGS
        if values[setting.name] != setting.default
    )
