"""Restart a service in its own tests, without systemd.

    def test_a_restart_loses_nothing():
        with Manager(sys.executable, "counter.py") as manager:
            with manager.connect() as client:
                client.sendall(b"incomplete")
                manager.restart()
                client.sendall(b" line\\n")
                assert client.recv(100) == b"1 incomplete line\\n"

`Manager` plays the service manager as far as `outlive` notices: it listens, passes the socket and
what has been stored, keeps descriptors, and sends signals. It does not read units: whether these
are right is shown only by systemd itself.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from threading import Condition, Thread
from types import TracebackType
from typing import NamedTuple, Self

__all__ = ["Manager"]

#: SD_LISTEN_FDS_START of sd_listen_fds(3).
FIRST = 3


#: A message to itself, behind those of a service that has exited.
SETTLED = b"settled"


class Stored(NamedTuple):
    """A descriptor in the store; one that is `polled` is removed when it hangs up."""

    name: str
    fd: int
    polled: bool

    @property
    def hangs_up(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, 0)
        return self.polled and bool(poll.poll(0))


class Manager:
    """A service manager for one command. As a context manager, it starts the service, and stops it
    at the end.

    `store` is FileDescriptorStoreMax= in the unit, and `descriptors` is LimitNOFILE=. All methods
    raise AssertionError, with the output of the service, if it does not do what it should within
    `timeout` seconds.
    """

    def __init__(
        self,
        *command: str,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        store: int = 8,
        descriptors: int = 0,
        environ: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> None:
        self.command = command
        self.store = store
        self.descriptors = descriptors
        self.timeout = timeout
        self.name = "test.socket"  #: of the listening socket: FileDescriptorName= in its unit
        self.status = ""  #: what `systemctl status` would show
        self.pid = 0  #: of the service while it runs
        self.is_stopping = False  #: whether it has said so
        self._environ = dict(os.environ if environ is None else environ)
        self._listening = socket.create_server(listen, backlog=4096)
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self._stored: list[Stored] = []
        self._exit: int | None = None
        self._ready = self._settled = False
        self._news = Condition()
        self._output = TemporaryFile("w+b")  # noqa: SIM115  closed in `close`
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind("")  # the kernel chooses an abstract name
        self._receiver = Thread(target=self._receive, daemon=True)
        self._receiver.start()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        try:
            if self.pid and kind is None:
                self.stop()
        finally:
            if self.pid:
                self._kill_if_running()
            self.close()

    @property
    def output(self) -> str:
        """What the service has written to standard output and standard error."""
        return os.pread(self._output.fileno(), 2**24, 0).decode(errors="replace")

    def connect(self) -> socket.socket:
        """A client."""
        return socket.create_connection(self.address, self.timeout)

    def start(self) -> None:
        """Start the service, and wait until it is ready: `systemctl start`."""
        self._ready, self._exit, self.is_stopping = False, None, False
        self.pid = self._spawn()
        Thread(target=self._reap, args=[self.pid], daemon=True).start()
        self._wait("become ready", lambda: self._ready)

    def restart(self) -> None:
        """Restart the service, which may keep its connections: `systemctl restart`."""
        self.stop_to_restart()
        self.start()

    def stop_to_restart(self) -> None:
        """The first half of a restart."""
        self._end(signal.SIGUSR2, (0, -signal.SIGUSR2))

    def reload(self) -> None:
        """Send SIGHUP, and wait until the service is ready again: `systemctl reload`."""
        self._ready = False
        self.send(signal.SIGHUP)
        self._wait("become ready again", lambda: self._ready)

    def stop(self) -> None:
        """Stop the service, and empty its store: `systemctl stop`."""
        self._end(signal.SIGTERM, (0,))
        self._clear()

    def kill(self) -> None:
        """Kill the service, whose store remains, as that of a unit with Restart=always."""
        self._end(signal.SIGKILL, (-signal.SIGKILL,))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the service."""
        assert self.pid, f"{self._what} is not running\n{self.output}"
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait until the service exits, and return its status, or minus the signal's number."""
        with self._news:
            assert self._news.wait_for(lambda: self._exit is not None, self.timeout), (
                f"{self._what} does not exit within {self.timeout} s\n{self.output}"
            )
        self._settle()
        self.pid = 0
        assert self._exit is not None
        return self._exit

    def close(self) -> None:
        """Close the listening socket and empty the store."""
        self._notify.shutdown(socket.SHUT_RDWR)
        self._receiver.join()
        self._notify.close()
        self._clear()
        self._listening.close()
        self._output.close()

    @property
    def _what(self) -> str:
        return " ".join(self.command)

    def _spawn(self) -> int:
        """Start the command with the descriptors that are passed to it."""
        with self._news:
            for one in [one for one in self._stored if one.hangs_up]:
                self._remove(one)
            passed = [(self.name, self._listening.fileno())]
            passed += [(one.name, one.fd) for one in self._stored]
        environ = self._environ | {
            "NOTIFY_SOCKET": "@" + self._notify.getsockname()[1:].decode(),
            "LISTEN_FDS": str(len(passed)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in passed),
        }
        # Only the process itself knows its number.
        script = 'export LISTEN_PID=$$ && exec "$@"'
        if self.descriptors:
            script = f"ulimit -n {self.descriptors} && {script}"
        output = self._output.fileno()
        places = {1: output, 2: output} | dict(enumerate((fd for _, fd in passed), FIRST))
        with _descriptors(places) as actions:
            words = ("sh", "-c", script, "sh", *self.command)
            return os.posix_spawn("/bin/sh", words, environ, file_actions=actions)

    def _end(self, number: signal.Signals, statuses: tuple[int, ...]) -> None:
        self.send(number)
        status = self.wait()
        assert status in statuses, f"{self._what} exited with {status}\n{self.output}"

    def _kill_if_running(self) -> None:
        if self._exit is None:
            with suppress(ProcessLookupError):  # it exits now
                os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        with self._news:
            self._news.wait_for(lambda: condition() or self._exit is not None, self.timeout)
            if self._exit is not None:
                self.pid = 0
            done = condition()
        assert done, f"{self._what} did not {what} (exit status {self._exit})\n{self.output}"

    def _reap(self, pid: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with self._news:
            self._exit = status
            self._news.notify_all()

    def _settle(self) -> None:
        """Wait until everything that the service has sent is received."""
        with self._news:
            self._settled = False
            self._notify.sendto(SETTLED, self._notify.getsockname())
            assert self._news.wait_for(lambda: self._settled, self.timeout)

    def _receive(self) -> None:
        while True:
            data, files, _, _ = socket.recv_fds(self._notify, 65536, 253)
            if not data:
                return
            lines = data.decode().split("\n")
            fields = dict(line.split("=", 1) for line in lines if "=" in line)
            with self._news:
                self._keep(fields, files)
                self.status = fields.get("STATUS", self.status)
                self._ready = self._ready or "READY" in fields
                self.is_stopping = self.is_stopping or "STOPPING" in fields
                self._settled = self._settled or data == SETTLED
                self._news.notify_all()

    def _keep(self, fields: Mapping[str, str], files: list[int]) -> None:
        """Store or remove descriptors, as sd_notify(3) describes it."""
        name = fields.get("FDNAME", "stored")
        if "FDSTOREREMOVE" in fields:
            for one in [one for one in self._stored if one.name == name]:
                self._remove(one)
        for fd in files:
            if "FDSTORE" in fields and len(self._stored) < self.store:
                self._stored.append(Stored(name, fd, fields.get("FDPOLL") != "0"))
            else:
                os.close(fd)

    def _remove(self, one: Stored) -> None:
        self._stored.remove(one)
        os.close(one.fd)

    def _clear(self) -> None:
        with self._news:
            for one in list(self._stored):
                self._remove(one)


@contextmanager
def _descriptors(places: Mapping[int, int]) -> Iterator[list[tuple[int, int, int]]]:
    """File actions of posix_spawn that put descriptors into their places, none over another."""
    above = max(places) + 1
    copies = {new: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for new, fd in places.items()}
    try:
        yield [(os.POSIX_SPAWN_DUP2, copy, new) for new, copy in copies.items()]
    finally:
        for copy in copies.values():
            os.close(copy)
