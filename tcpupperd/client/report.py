"""The lines in which the connections of a ping report what happens."""

import time

from tcpupperd.client.options import PingOptions


class Report:
    """What one connection reports: normal events and problems, of which the options may omit
    some."""

    def __init__(self, output: list[str], prefix: str, options: PingOptions) -> None:
        """Lines are appended to ``output`` and begin with ``prefix``."""
        self._output = output
        self._prefix = prefix
        self._options = options

    def normal(self, text: str) -> None:
        if self._options.show == "all":
            self._print(text)

    def problem(self, text: str) -> None:
        if self._options.show in ("all", "problems"):
            self._print(text)

    def _print(self, text: str) -> None:
        stamp = f"[{time.time():.6f}] " if self._options.timestamps else ""
        self._output.append(f"{stamp}{self._prefix}{text}\n")
