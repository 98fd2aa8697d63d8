"""A terminal, at which a test types and reads."""

import contextlib
import os
import re
import subprocess
import termios
from collections.abc import Iterator, Sequence
from typing import Any, Self

from integration.tcpupper import ROOT
from waiting import until


class Terminal:
    """A context manager for a pseudo-terminal: programs use `descriptor`."""

    def __enter__(self) -> Self:
        self._master, self.descriptor = os.openpty()
        os.set_blocking(self._master, False)
        termios.tcsetwinsize(self.descriptor, (24, 80))
        self._read = b""
        self.settings = self.settings_now()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        os.close(self.descriptor)

    def close(self) -> None:
        """Close it, as a terminal emulator or sshd does; programs still have their end."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    @property
    def text(self) -> str:
        """All that was written to it."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._read += os.read(self._master, 65536)
        return self._read.decode(errors="replace").replace("\r\n", "\n")

    def shows(self, pattern: str) -> None:
        """Wait for what matches."""
        until(lambda: re.search(pattern, self.text))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def settings_now(self) -> list[Any]:
        """How it is set up, by termios(3)."""
        return termios.tcgetattr(self.descriptor)

    @contextlib.contextmanager
    def running(
        self, command: Sequence[str], **streams: int
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a command whose standard streams are this terminal, unless others are given; as one
        that has no escape sequences. Ctrl-C interrupts it if it reads from here."""
        environment = {**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"}
        words = [*command]
        if "stdin" not in streams:  # by which setsid(1) finds the terminal
            words = ["setsid", "--ctty", *words]
        with subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdin=streams.get("stdin", self.descriptor),
            stdout=streams.get("stdout", self.descriptor),
            stderr=streams.get("stderr", self.descriptor),
        ) as process:
            try:
                yield process
            finally:
                process.kill()
