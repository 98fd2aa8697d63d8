"""A real daemon, started as its users start it, and watched from outside."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from integration.client import Client
from integration.manager import Manager
from integration.processes import (
    children,
    descriptors,
    is_keeper,
    is_running,
    marked,
    polled_for,
    socket_inode,
    state,
    stopped,
)
from waiting import DEADLINE, until

ROOT = Path(__file__).parents[2]

COMMAND = (sys.executable, "-m", "tcpupperd")

#: Passes sockets on as sd_listen_fds(3) has it: descriptors from 3 on, and the process number,
#: which only the process itself knows. Arguments: their numbers now, their names, the command.
PASS_SOCKETS = """
import fcntl, os, sys
numbers, names, *command = sys.argv[1:]
low = [int(number) for number in numbers.split(",")]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 1000) for fd in low]
for fd in low:
    os.close(fd)
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
    os.close(fd)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high))}
os.environ |= {"LISTEN_FDNAMES": names}
os.execvp(command[0], command)
"""


class Daemon:
    """A context manager that runs a daemon; none of its processes may be left at the end."""

    def __init__(
        self,
        *options: str,
        manager: Manager | None = None,
        passed: Sequence[tuple[str, socket.socket]] = (),
        wrapper: Sequence[str] = (),
        notify: bool = True,
        **settings: Any,
    ) -> None:
        """Settings go to the configuration file, `passed` sockets with their names to the
        process, whose command `wrapper` is put before. It notifies `manager`, or else one of its
        own, or without `notify` nobody."""
        self._stack = contextlib.ExitStack()
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.manager = manager or self._stack.enter_context(
            Manager(str(self.directory / "notify"))
        )
        self.clients: list[Client] = []
        self.knock_at = ""  # where to connect for it to be started, as by socket activation
        self.ended_by = signal.SIGTERM  # at the end of the context
        self._notify = notify
        self._passed = passed
        self._settings = {"listen": ["127.0.0.1:0"], "workers": 2} | settings
        self.config = self.directory / "tcpupperd.toml"
        self.configure()
        self.command = [*wrapper, *COMMAND, "--config", str(self.config), *options]
        if passed:
            numbers = ",".join(str(one.fileno()) for _, one in passed)
            names = ":".join(name for name, _ in passed)
            self.command[:0] = [sys.executable, "-c", PASS_SOCKETS, numbers, names]

    def configure(self, text: str = "", **settings: Any) -> None:
        """Write the configuration file: the settings so far, these, and any `text`."""
        self._settings |= settings
        # Numbers, strings and lists of them look the same in JSON and in TOML.
        rows = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
            for name, value in self._settings.items()
        ]
        # Atomically, so that no reload reads half of it.
        new = self.config.with_suffix(".new")
        new.write_text("".join(rows) + text, encoding="utf-8")
        new.replace(self.config)

    # Running

    def __enter__(self) -> Self:
        try:
            self._start()
            if self.knock_at:
                until(self._knock)
            until(lambda: self._is_ready() or self.process.poll() is not None)
            assert self._is_ready(), f"exited with status {self.process.poll()}"
            if self._notify:
                self.manager.wait("READY=1")  # so that a later call waits for a later one
        except BaseException:
            print(self.log[-10_000:])
            self._clean_up()
            raise
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind:
                print(self.log[-10_000:])
            else:
                self._check_end()
        finally:
            self._clean_up()

    def run(self) -> tuple[int, str]:
        """Run a daemon that is expected to exit by itself; return its exit status and its log."""
        with self._stack:
            self._start()
            try:
                return self.process.wait(DEADLINE), self.log
            finally:
                self._kill_left()

    def _start(self) -> None:
        names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE", "JOURNAL_STREAM")
        environment = {name: os.environ[name] for name in os.environ.keys() - names}
        environment["TEST_DIRECTORY"] = str(self.directory)  # by which its processes are found
        if self._notify:
            environment |= self.manager.environment
        with open(self.directory / "log", "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[one.fileno() for _, one in self._passed],
            )

    def _is_ready(self) -> bool:
        if self._notify:
            return bool(self.manager.find("READY=1"))
        return "ready: " in self.log

    def _knock(self) -> bool:
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
            return bool(self.connect(self.knock_at))
        return False

    def _check_end(self) -> None:
        """Stop it if it is still running, and check that it leaves nothing behind."""
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            until(lambda: not self.zombies())
            self.stop(self.ended_by)
        # If the supervisor was killed, nothing waits for the keepers of its workers.
        until(lambda: not marked(str(self.directory)))

    def _clean_up(self) -> None:
        with self._stack:
            for client in self.clients:
                client.close()
            self._kill_left()

    def _kill_left(self) -> None:
        for pid in marked(str(self.directory)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(DEADLINE)

    # What a test does with it

    def send_signal(self, number: int) -> None:
        """Send a signal to the supervisor."""
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop it by a signal, as asked for: with exit status 0."""
        self.send_signal(number)
        assert self.wait() == 0, self.log

    def wait(self, timeout: float = DEADLINE) -> int:
        """The exit status, once the supervisor has ended."""
        return self.process.wait(timeout)

    def reload(self, **settings: Any) -> None:
        """Reload with changed settings, successfully."""
        self.configure(**settings)
        done = self.log.count("reloaded: ")
        self.send_signal(signal.SIGHUP)
        until(lambda: self.log.count("reloaded: ") > done)

    def connect(self, address: str = "", receive_buffer: int = 0) -> Client:
        """A new client; it is closed at the end."""
        client = Client(address or self.addresses[0], receive_buffer)
        self.clients.append(client)
        return client

    def clog(self, client: Client) -> bytes:
        """Send to the daemon, reading nothing, until it waits to send; what was sent."""
        pid, fd = self._place_of(client)
        return client.clog(lambda: bool(polled_for(pid, fd) & select.EPOLLOUT))

    # What is seen of it

    @property
    def pid(self) -> int:
        """The supervisor."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it wrote to standard error."""
        return (self.directory / "log").read_text(errors="replace")

    @property
    def addresses(self) -> list[str]:
        """Where it listens, as it says itself in its status, or else in its log."""

        def said() -> list[str]:
            return re.findall(r"[Ll]istening on ([^;\n]+)", self.manager.status or self.log)

        return until(said)[-1].split(", ")

    def address_of(self, service: str) -> str:
        """Where it listens for a service other than upper."""
        (found,) = (one for one in self.addresses if one.startswith(f"{service}="))
        return found.partition("=")[2]

    def workers(self) -> list[int]:
        """The running workers."""
        return [pid for pid in children(self.pid) if is_running(pid) and not is_keeper(pid)]

    def keepers(self) -> list[int]:
        """The running keepers of workers."""
        return [pid for pid in children(self.pid) if is_running(pid) and is_keeper(pid)]

    def kill_with_keeper(self, worker: int) -> None:
        """Kill a worker and its keeper, so that its connections are lost."""
        (keeper,) = (pid for pid in self.keepers() if descriptors(pid) == descriptors(worker))
        with stopped(worker, keeper):
            os.kill(keeper, signal.SIGKILL)
            os.kill(worker, signal.SIGKILL)

    def wait_for_workers(self, count: int, *, without: int = 0) -> list[int]:
        """The workers, once there are this many and a given one is not among them."""

        def found() -> list[int]:
            workers = self.workers()
            return workers if len(workers) == count and without not in workers else []

        return until(found)

    def all_workers(self) -> list[int]:
        """The workers, once none is missing: one that starts its keeper is taken for a keeper."""
        count = self._settings["workers"]
        assert isinstance(count, int)
        return self.wait_for_workers(count)

    def has_dismissed_workers(self) -> bool:
        """Whether all workers have been told to leave: the supervisor has no pipe to any."""
        return not any(target.startswith("pipe:") for target in descriptors(self.pid).values())

    def zombies(self) -> list[int]:
        """Children that have ended and are not waited for."""
        return [pid for pid in children(self.pid) if state(pid) == "Z"]

    def worker_of(self, client: Client) -> int:
        """The worker that serves a client."""
        return self._place_of(client)[0]

    def counters(self) -> dict[str, int]:
        """Its counters, which SIGUSR1 makes it log."""
        logged = self.log.count("counters: ")
        self.send_signal(signal.SIGUSR1)
        until(lambda: self.log.count("counters: ") > logged and self.log.endswith("\n"))
        line = self.log.rpartition("counters: ")[2].splitlines()[0]
        return {name: int(count) for name, count in (word.split("=") for word in line.split())}

    def _place_of(self, client: Client) -> tuple[int, int]:
        """The worker that serves a client, and the descriptor it does it by."""

        def find() -> tuple[int, int] | None:
            inode = socket_inode(client.peer_port, client.port)
            for pid in self.workers():
                for fd, target in descriptors(pid).items():
                    if inode and target == f"socket:[{inode}]":
                        return pid, fd
            return None

        return until(find)


class Shared(Daemon):
    """A daemon for several tests. Each calls `renew` first, and finds no clients, an empty log and
    counters at zero."""

    _logged = 0
    _counted: Mapping[str, int] = MappingProxyType({})

    def renew(self) -> None:
        """Forget the test before."""
        for client in self.clients:
            with contextlib.suppress(OSError):  # it may be closed
                client.reset()  # which is noticed even where nothing is read
        self.clients.clear()
        self.all_workers()  # none is left of those that a reload has replaced
        until(lambda: self.counters()["open"] == 0)
        self._logged, self._counted = 0, {}
        self._logged, self._counted = len(self.log), self.counters()

    @property
    def log(self) -> str:
        """What it has written since the test began."""
        return super().log[self._logged :]

    def counters(self) -> dict[str, int]:
        """What it has counted since the test began."""
        before = self._counted
        return {name: count - before.get(name, 0) for name, count in super().counters().items()}
