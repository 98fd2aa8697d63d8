"""Where the configuration comes from: the file and the command line, or else what worked last."""

from __future__ import annotations

import logging
from typing import Any

from tcpupperd import config
from tcpupperd.config import Config, ConfigError
from tcpupperd.errors import ExpectedError
from tcpupperd.processes.store import Store

log = logging.getLogger(__name__)


class Source:
    """The configuration's file and options, and the store that has the last one that worked."""

    def __init__(self, path: str | None, options: dict[str, Any], store: Store) -> None:
        self._path = path
        self._options = options
        self._store = store
        self.trouble = ""  # for the status line, while the last one that worked is in use

    def load(self) -> Config:
        """What file and options say; ConfigError if anything is wrong."""
        return config.load(self._path, self._options)

    def last_good(self) -> Config | None:
        """The last configuration that worked, as far as this version knows its settings; None if
        none is kept. Options override it."""
        if not self._path or self._store.configuration is None:
            return None
        found: dict[str, Any] = {}
        for line in self._store.configuration.splitlines():
            try:
                found |= config.parse(line, "the stored configuration")
            except ConfigError as error:  # of another version
                log.warning("left out: %s", error)
        return Config(**(found | self._options))

    def fall_back(self, error: ExpectedError) -> Config:
        """The last configuration that worked, in place of one that does not; the error again, if
        none is kept."""
        found = self.last_good()
        if not found:
            raise error
        self.complain(error)
        return found

    def complain(self, error: ExpectedError | str) -> None:
        """Tell that the last configuration that worked is in use."""
        for line in str(error).splitlines():
            log.error("%s", line)
        log.error("running with the last good configuration; correct %s and reload", self._path)
        self.trouble = f"{self._path} is wrong, running with the last good configuration"

    def keep(self, good: Config) -> None:
        """Have the store keep a configuration that works."""
        if self._path:
            self._store.keep_configuration(written(good))


def written(settings: Config) -> str:
    """A configuration as a TOML text, a line for each setting that is not as by default. So
    another version can leave out what it does not know, line by line."""
    values = vars(settings)
    return "".join(
        f"{setting.name} = {config.as_toml(values[setting.name])}\n"
        for setting in config.SETTINGS
        if values[setting.name] != setting.default
    )
