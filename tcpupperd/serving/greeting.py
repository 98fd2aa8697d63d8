"""The greeting: a line for each new client that says which server has accepted it."""

from __future__ import annotations

import os
import socket
from typing import Self

from tcpupperd.config import Config
from tcpupperd.words import written


class Greeting:
    """A line with placeholders, already validated by `settings.greeting`."""

    def __init__(self, template: str, instance: str) -> None:
        fixed = {"host": socket.gethostname(), "instance": instance, "worker": str(os.getpid())}
        for name, value in fixed.items():
            template = template.replace(f"{{{name}}}", value)
        self._template = template

    @classmethod
    def of(cls, config: Config, instance: str) -> Self | None:
        """The greeting in a configuration named `instance`, if it has one."""
        return cls(config.greeting, instance) if config.greeting else None

    def line(self, client_address: object) -> bytes:
        """The line for a client."""
        text = self._template.replace("{client}", written(client_address))
        return f"{text}\n".encode(errors="surrogateescape")
