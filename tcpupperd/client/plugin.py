"""The requirements of the Monitoring Plugins Development Guidelines for every plugin."""

from __future__ import annotations

import os

from tcpupperd.arguments import Parser
from tcpupperd.errors import ExpectedError
from tcpupperd.output import write_output

TYPE_CHECKING = False  # as in typing, which the client does not import
if TYPE_CHECKING:
    from typing import NoReturn

#: Exit statuses. A problem with the check itself, rather than with the server, is UNKNOWN.
OK, WARNING, CRITICAL, UNKNOWN = range(4)
NAMES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


def report(status: int, text: str, performance: str = "") -> int:
    """Print the only line that counts; return the status. ``|`` starts the performance data."""
    safe = "".join(letter if letter.isprintable() else "?" for letter in text.replace("|", "/"))
    data = f" | {performance}" if performance else ""
    write_output(os.fsencode(f"TCPUPPER {NAMES[status]}: {safe}{data}\n"))
    return status


class PluginParser(Parser):
    """A command line parser that never exits with a status that looks like the server's.

    Even --help exits with UNKNOWN: a check that only ever prints the help must not be OK.
    """

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(UNKNOWN, message)

    def error(self, message: str) -> NoReturn:
        """Print the message where a monitoring system will read it."""
        try:
            self.exit(report(UNKNOWN, message))
        except ExpectedError as error:
            self.exit(message=f"tcpupper: {error}\n")
