"""What the Monitoring Plugins Development Guidelines ask of every plugin."""

from __future__ import annotations

import os

from tcpupperd.arguments import Parser
from tcpupperd.client.output import write_output
from tcpupperd.errors import ExpectedError

TYPE_CHECKING = False  # of typing, which the client does not import
if TYPE_CHECKING:
    from typing import NoReturn

#: Exit statuses. Whatever is wrong with the check itself, rather than with the server, is UNKNOWN.
OK, WARNING, CRITICAL, UNKNOWN = range(4)
NAMES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


def report(status: int, text: str, performance: str = "") -> int:
    """Print the one line that is read; return the status. ``|`` begins the performance data."""
    safe = "".join(letter if letter.isprintable() else "?" for letter in text.replace("|", "/"))
    data = f" | {performance}" if performance else ""
    write_output(os.fsencode(f"TCPUPPER {NAMES[status]}: {safe}{data}\n"))
    return status


class PluginParser(Parser):
    """A command line parser that never exits with a status that looks like one of the server.

    Even --help is UNKNOWN: a check that only ever prints it must not be OK.
    """

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(UNKNOWN, message)

    def error(self, message: str) -> NoReturn:
        """Print the message where a monitoring system reads it."""
        try:
            self.exit(report(UNKNOWN, message))
        except ExpectedError as error:
            self.exit(message=f"tcpupper: {error}\n")
