"""A journal for the daemon to log to, and a bug for it to report."""

import socket
import sys
from pathlib import Path

from integration.daemon import ROOT
from waiting import DEADLINE

#: Runs a command with its standard error connected to a Unix socket, and says so in
#: JOURNAL_STREAM, as systemd does with StandardError=journal.
LOG_TO_JOURNAL = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as journal:
    journal.connect(sys.argv[1])
    os.dup2(journal.fileno(), 2)
status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
os.environ["PYTHONPATH"] = sys.argv[2]
os.execvp(sys.argv[3], sys.argv[3:])
"""

#: Has the daemon find the journal of the test.
REDIRECT = """
from tcpupperd.host import journal
journal.SOCKET = {socket!r}
"""

#: Gives the daemon a bug.
BUG = """
from tcpupperd.serving import services
class FailingProtocol(services.LineProtocol):
    def receive(self, data):
        if b"bug" in data:
            raise RuntimeError("a bug")
        return super().receive(data)
services.LineProtocol = FailingProtocol
"""


class Journal:
    """Reads what daemons log to it: lines, because its socket for entries does not exist until it
    is bound."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "socket"
        self.customize = directory / "sitecustomize.py"  # runs before the daemon
        self.customize.write_text(REDIRECT.format(socket=str(self.socket)))
        path = str(directory / "stdout")
        found = f"{directory}:{ROOT}"
        self.wrapper = (sys.executable, "-c", LOG_TO_JOURNAL, path, found)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()

    def read_to_end(self) -> list[str]:
        """The lines of one that has ended."""
        stream, _ = self._listener.accept()
        with stream, stream.makefile() as lines:
            stream.settimeout(DEADLINE)
            return lines.read().splitlines()

    def close(self) -> None:
        self._listener.close()
