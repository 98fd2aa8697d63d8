"""The rollout of a configuration: the generation that is to serve, and the one to go back to."""

from __future__ import annotations

from tcpupperd.config_file import ConfigError
from tcpupperd.host.sockets import ListenError, Listeners
from tcpupperd.processes.generation import Generation
from tcpupperd.processes.source import Source


class Rollout:
    """Applies one generation at a time. The one before is kept until the rollout is complete."""

    def __init__(self, source: Source, listeners: Listeners) -> None:
        """Begin with the configuration or, if it cannot be applied, with the last good one. Raises
        ConfigError or ListenError if neither can be applied."""
        self.source = source
        self.listeners = listeners
        self.previous: Generation | None = None  # until the workers of the next one serve
        try:
            self.generation = source.load()
            self.generation.apply(listeners)
        except (ConfigError, ListenError) as error:
            self.generation = source.fall_back(error)
            self.generation.apply(listeners)
        else:
            last_good = source.last_good()
            if last_good and last_good.text != self.generation.text:
                self.previous = last_good

    def begin(self) -> None:
        """Read the configuration again, and apply it. Raises ConfigError or ListenError; then
        nothing has changed."""
        generation = self.source.load()
        generation.apply(self.listeners)
        self.previous, self.generation = self.generation, generation

    def undo(self) -> None:
        """Go back to the previous generation."""
        assert self.previous
        self.generation, self.previous = self.previous, None
        self.generation.apply(self.listeners)
        self.listeners.keep_only(self.generation.config.listen)

    def complete(self) -> bool:
        """The generation works: store it as the last good configuration, and stop listening on
        addresses that it does not have. Return whether there were any."""
        self.previous = None
        self.source.keep(self.generation)
        return self.listeners.keep_only(self.generation.config.listen)
