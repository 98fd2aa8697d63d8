"""Random processes are killed, and no client notices; tests/system does so in containers."""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from integration.daemon import Daemon
from integration.measures import SOAK, scaled
from integration.processes import kill, worker_of
from integration.service import Service
from load.clients import Clients
from load.kills import GREETING, HEADER, Kills, Processes
from tools import need
from waiting import until

SOURCE = Path(__file__).parents[1] / "load/clients.c"
CONNECTIONS = 100
SEED = int(os.environ.get("SEED", str(time.time_ns()) if SOAK else "23"))
LIVES, KILLS = scaled(3, 10), scaled(6, 60)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The load generator."""
    target = str(tmp_path_factory.mktemp("load") / "clients")
    subprocess.run([need("cc"), "-O2", "-o", target, str(SOURCE)], check=True)
    return target


class World:
    """One daemon after the other, with two listeners, and clients of both."""

    def __init__(self, service: Service, program: str, greeting: str, stack: ExitStack) -> None:
        self._service, self._greeting = service, greeting
        self._proxy = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        self._loads = [
            stack.enter_context(at_work(program, listener, header, greeting))
            for listener, header in ((service.listener, ""), (self._proxy, HEADER))
        ]
        self.kills = Kills(self._loads, self._processes, kill, random.Random(SEED))

    def daemon(self) -> Daemon:
        """The next daemon."""
        service = self._service
        passed = [(service.name, service.listener), ("proxy", self._proxy)]
        self._daemon = Daemon(
            manager=service.manager,
            passed=[*passed, *service.manager.stored.items()],
            greeting=self._greeting,
            proxy_from=["127.0.0.0/8"],
        )
        return self._daemon

    def _processes(self) -> Processes:
        daemon = self._daemon
        keepers = {keeper: worker_of(keeper) for keeper in daemon.keepers()}
        return Processes(frozenset(daemon.workers()), keepers)


@pytest.mark.parametrize("greeting", ["", GREETING], ids=["not greeted", "greeted"])
@pytest.mark.usefixtures("many_in_flight")
def test_random_kills(service: Service, program: str, greeting: str) -> None:
    """During reloads and restarts, too; of clients of both listeners."""
    with ExitStack() as stack:
        world = World(service, program, greeting, stack)
        kills = world.kills
        for _ in range(LIVES):
            with world.daemon() as daemon:
                until(lambda: "ready: " in daemon.log)
                for number in range(KILLS):
                    if number % 3 == 2:
                        daemon.send_signal(signal.SIGHUP)
                    kills.kill()
                    kills.settle()
                daemon.send_signal(signal.SIGUSR2)
                kills.kill()
                assert daemon.wait() == 0
                assert "Traceback" not in daemon.log
                assert "bug" not in daemon.log
        assert kills.faults() == {}
    print(f"SEED={SEED}: {dict(kills.done)}, longest gap {max(kills.gaps):.2f} s")


@contextmanager
def at_work(
    program: str, listener: socket.socket, header: str, greeting: str
) -> Iterator[Clients]:
    """Clients, whose connections wait until there is a daemon."""
    port = listener.getsockname()[1]
    command = [program, f"--port={port}", f"--connections={CONNECTIONS}", "--round=0.5"]
    command += [f"--header={header}"] * bool(header) + [f"--greeting={greeting}"] * bool(greeting)
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
        try:
            yield Clients(process)
        finally:
            process.kill()
