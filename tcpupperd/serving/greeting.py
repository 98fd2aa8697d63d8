"""The greeting: a line for each new client that says which server has accepted it."""

from __future__ import annotations

import os
import re
import socket
from typing import Self

from tcpupperd.config import Config
from tcpupperd.serving.introduction import Introduction
from tcpupperd.settings import INTRODUCED
from tcpupperd.words import written

_OF_CLIENT = re.compile(f"{{({'|'.join(('client', *INTRODUCED))})}}")


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

    def line(self, client_address: object, introduction: Introduction) -> bytes:
        """The line for a client; what nobody has said about it is "-"."""
        known = {"client": written(client_address), **introduction}
        # In one pass: what a load balancer says is not searched for placeholders.
        text = _OF_CLIENT.sub(lambda found: known.get(found[1], "-"), self._template)
        return f"{text}\n".encode(errors="surrogateescape")
