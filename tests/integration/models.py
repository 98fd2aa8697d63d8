"""The programs that the documentation shows as models, under the test's own service manager."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from documents import ROOT, blocks, versions
from integration.client import Client, many_lines
from integration.daemon import PASS_SOCKETS
from integration.processes import listening_addresses
from integration.service import Service
from waiting import DEADLINE, until

SETTINGS = "counter.toml"
#: So long that a client need not be sent hundreds of thousands of lines before it is too slow.
PREFIX = b"a long prefix, " * 10


@dataclass(frozen=True)
class Model:
    """A program, and what it has learned so far."""

    name: str
    files: Mapping[str, str]  # the last one is the program itself
    lines: memoryview  # for clients that read slowly
    answers: Callable[[bytes], bytes]
    notifies: bool = False
    is_activated: bool = False  # takes the socket that the service manager passes
    has_settings: bool = False
    keeps_connections: bool = False
    may_log: str = ""  # while no descriptors are left
    falls_back: str = ".*counter.toml: .*; using the last good one\n"  # what it logs then

    def write(self, folder: Path) -> Path:
        """Write its files, with paths of the test's own and any free port; return the program."""
        for name, text in self.files.items():
            with_path = text.replace(f"/etc/{SETTINGS}", str(folder / SETTINGS))
            (folder / name).write_text(with_path.replace('"127.0.0.1", 7000', '"127.0.0.1", 0'))
        return folder / name


def counted(prefix: bytes) -> Callable[[bytes], bytes]:
    """How the tutorial's program answers the lines of a client, from the first on."""
    return lambda sent: numbers(prefix, 0, sent.count(b"\n"))


def numbers(prefix: bytes, before: int, count: int) -> bytes:
    """The answers to this many lines, after those before."""
    return b"".join(prefix + b"%d\n" % number for number in range(before + 1, before + count + 1))


def of_the_tutorial() -> list[Model]:
    """The program after each step that changes it or its unit."""
    text = (ROOT / "docs/tutorial.md").read_text()
    models = []
    for step in range(1, 8):
        *_, files = versions(text[: text.index(f"\n## {step + 1}. ")])
        models.append(
            Model(
                f"tutorial-{step}",
                {name: files[name] for name in ("server.py", "counter.py")},
                memoryview(b"\n" * 8_000_000),
                counted(PREFIX if step >= 5 else b""),
                notifies=step >= 2,
                is_activated=step >= 3,
                has_settings=step >= 5,
                keeps_connections=step >= 7,
            )
        )
    return models


def with_the_library() -> Model:
    """The tutorial's program on `outlive`."""
    *_, files = versions((ROOT / "docs/tutorial.md").read_text())
    name = "asyncio_counter.py"
    return Model(
        "tutorial-outlive",
        {name: files[name]},
        memoryview(b"\n" * 8_000_000),
        counted(PREFIX),
        notifies=True,
        is_activated=True,
        has_settings=True,
        keeps_connections=True,
        # The latter while other tests of this user have many descriptors in flight.
        may_log="(new clients wait: .*\n|cannot send FDSTORE=1 .* Too many references: .*\n)*",
        falls_back=".*counter.toml: .*\n(.*last good.*\n)*",
    )


def of_the_readme() -> Model:
    """The server that it embeds, in a program that does nothing else."""
    (example,) = (
        block.text
        for block in blocks((ROOT / "README.md").read_text())
        if block.language == "python"
    )
    server, _, _ = example.partition("    with socket.create_connection")
    at_limit = "((not accepting connections: .*|accepting connections again)\\n)*"
    text = f"{server}    import sys\n    sys.stdin.read()\n"
    return Model("readme", {"embedding.py": text}, many_lines(), bytes.upper, may_log=at_limit)


MODELS = [of_the_readme(), *of_the_tutorial(), with_the_library()]


class Running:
    """A context manager that runs a model; its end is a stop, for a restart if the model keeps
    connections. Its log must be what `may_log` matches."""

    def __init__(
        self, model: Model, service: Service, folder: Path, wrapper: Sequence[str] = ()
    ) -> None:
        self.model = model
        self.program = model.write(folder)
        self.settings = folder / SETTINGS
        self.may_log = model.may_log
        self._service = service
        self._log = folder / "log"
        self._wrapper = wrapper
        if model.has_settings and not self.settings.exists():
            self.configure(PREFIX)

    def configure(self, prefix: bytes) -> None:
        """Write the setting."""
        self.settings.write_text(f'prefix = "{prefix.decode()}"\n')

    def start(self) -> None:
        """Start it, and do not wait."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        manager = self._service.manager
        passed = [("counter.socket", self._service.listener), *manager.stored.items()]
        files = [one.fileno() for _, one in passed] if self.model.is_activated else []
        command = [*self._wrapper, sys.executable, str(self.program)]
        if files:
            names = ":".join(name for name, _ in passed)
            command[:0] = [sys.executable, "-c", PASS_SOCKETS, ",".join(map(str, files)), names]
        if self.model.notifies:
            environment |= manager.environment
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=files, stdin=subprocess.PIPE, stderr=log
            )

    def run(self) -> int:
        """Run one that is expected to exit by itself; its exit status."""
        self.start()
        try:
            return self.process.wait(DEADLINE)
        finally:
            self._kill()

    def __enter__(self) -> Self:
        self.start()
        with ExitStack() as unless_ready:
            unless_ready.push(self)
            self._wait_until_ready()
            unless_ready.pop_all()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind:
                print(self.log)
            else:
                self._check_end()
        finally:
            self._kill()

    def _wait_until_ready(self) -> None:
        if self.model.notifies:
            self._service.manager.wait("READY=1")
        if self.model.is_activated:
            self.address = self._service.address
        else:
            [self.address, *_] = until(lambda: listening_addresses(self.process.pid))

    def _check_end(self) -> None:
        assert self.process.stdin
        if self.model.notifies:
            keeps = self.model.keeps_connections
            self.process.send_signal(signal.SIGUSR2 if keeps else signal.SIGTERM)
        elif self.model.name == "readme":
            self.process.stdin.close()
        else:
            self.process.terminate()
        status = self.process.wait(DEADLINE)
        assert re.fullmatch(self.may_log, self.log), self.log
        assert status in (0, -signal.SIGTERM, -signal.SIGKILL)

    def _kill(self) -> None:
        """Leave no process: it would keep descriptors in flight."""
        with self.process:  # whose standard input is closed, too
            self.process.kill()

    @property
    def log(self) -> str:
        """What it wrote to standard error."""
        return self._log.read_text()

    def connect(self, receive_buffer: int = 0) -> Client:
        """A client that is closed at the end of the test."""
        client = Client(self.address, receive_buffer)
        self._service.clients.append(client)
        return client


class Counting:
    """Clients of a counter that check every byte, each thread's one after another.

    What goes wrong is counted in `faults`: "refused", if no connection could be made; "lost", if
    one ended; "wrong", if an answer was wrong.
    """

    THREADS = 6

    def __init__(self, address: str, clients: int, prefix: bytes) -> None:
        self._address = address
        self._prefix = prefix
        self._clients = clients // self.THREADS
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._count) for _ in range(self.THREADS)]
        self.answers = [0] * self.THREADS
        self.faults: Counter[str] = Counter()
        self._free = itertools.count()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def go_on(self) -> None:
        """Wait until each thread has had an answer for each of its clients, begun after now."""
        before = list(self.answers)
        until(
            lambda: all(
                now >= then + 2 * self._clients
                for now, then in zip(self.answers, before, strict=True)
            )
        )

    def _count(self) -> None:
        number = next(self._free)
        clients = [self._connect() for _ in range(self._clients)]
        counts = [0] * self._clients
        while not self._over.is_set():
            for index, client in enumerate(clients):
                self._send(client, b"half" if index % 3 else b"a whole line\nmore\n" * index)
            for index, client in enumerate(clients):
                lines = 1 if index % 3 else 2 * index + 1
                expected = numbers(self._prefix, counts[index], lines)
                counts[index] += lines
                if not self._is_answered(client, expected):
                    client.close()
                    clients[index], counts[index] = self._connect(), 0
                self.answers[number] += 1
        for client in clients:
            client.close()

    def _connect(self) -> Client:
        while True:
            try:
                return Client(self._address)
            except ConnectionRefusedError:
                self.faults["refused"] += 1
                if self._over.wait(0.1):
                    raise

    def _send(self, client: Client, data: bytes) -> None:
        try:
            client.send(data)
        except (BrokenPipeError, ConnectionResetError):
            return  # which is counted when the answer is read

    def _is_answered(self, client: Client, expected: bytes) -> bool:
        self._send(client, b" line\n")
        try:
            answer = client.read(len(expected))
        except ConnectionResetError:
            answer = b""
        if not expected.startswith(answer):
            self.faults["wrong"] += 1
        elif answer != expected:
            self.faults["lost"] += 1
        return answer == expected
