"""The Unix socket of HAProxy (management guide, "Unix Socket commands")."""

import csv
import socket
from pathlib import Path

from waiting import until

#: That of `examples/haproxy/haproxy.cfg`.
BACKEND = "tcpupperd"


class HAProxy:
    """A running HAProxy, and the servers of BACKEND."""

    SERVERS = ("one", "two", "three")

    def __init__(self, path: Path) -> None:
        """`path` is that of its "stats socket"."""
        self._path = path

    def sees(self, server: str) -> bool:
        """Whether new clients go to a server, whose agent has been asked."""
        row = self._row(server)
        return row.get("status") == "UP" and row["weight"] != "0" and row["agent_status"] != ""

    def sees_all(self) -> bool:
        """The same of all servers."""
        return all(self.sees(name) for name in self.SERVERS)

    def wait_until_missed(self, server: str) -> None:
        """Wait until no new clients go to a server."""
        until(lambda: not self.sees(server))

    def status(self, server: str) -> str:
        """The state of a server, as the page of statistics shows it."""
        return self._row(server)["status"]

    def connections(self, server: str) -> int:
        """How many connections to a server are open."""
        return int(self._row(server)["scur"])

    def check(self, backend: str, server: str) -> str:
        """The result of a server's last health check; "" if there has been none."""
        found = (
            row["check_status"]
            for row in self._rows()
            if (row["pxname"], row["svname"]) == (backend, server)
        )
        return next(found, "")

    def tell(self, command: str) -> str:
        """Give a command as an administrator; return its output, "" if HAProxy is not listening
        yet."""
        with socket.socket(socket.AF_UNIX) as one:
            try:
                one.connect(str(self._path))
            except (FileNotFoundError, ConnectionRefusedError):
                return ""
            one.sendall(f"{command}\n".encode())
            with one.makefile() as answer:
                return answer.read()

    def _row(self, server: str) -> dict[str, str]:
        found = (row for row in self._rows() if row["svname"] == server)
        return next((row for row in found if row["pxname"] == BACKEND), {})

    def _rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader(self.tell("show stat").removeprefix("# ").splitlines()))
