"""A generation: a configuration with everything that was resolved from it."""

from __future__ import annotations

from typing import NamedTuple

from tcpupperd.config import Config
from tcpupperd.host import messages
from tcpupperd.host.sockets import Listeners

#: The identity of a file that does not exist.
NO_FILE = 0, 0


class Generation(NamedTuple):
    """What follows from reading the configuration once. Nothing in it changes afterwards.
    Generations are compared by identity."""

    config: Config  # its number of workers is a number, even if the setting is "auto"
    text: str  # the configuration as TOML, in which "auto" is "auto"
    file: tuple[int, int] = NO_FILE  # the identity of the file, if that is its source
    problem: str = ""  # for the status line, if the file is not its source

    def apply(self, listeners: Listeners) -> None:
        """Listen on its addresses too, and set the options of all listeners and the log level.
        Applying another generation undoes this. Raises ListenError; then nothing has changed."""
        listeners.bind(self.config.listen)
        for listener in listeners:
            listener.set_options(self.config.keepalive)
        messages.set_level(self.config.log_level)
