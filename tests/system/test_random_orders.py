"""Random sequences of what can happen to the service, under clients that check every byte.

SEED=n repeats a sequence, which the output names; SOAK=1 tries others, and longer ones.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from load.clients import LASTING, Clients, Report
from system.container import Container
from system.service import (
    CONFIGURATION,
    SERVICE,
    SOCKET,
    drop_in,
    is_active,
    main_pid,
    use_own_user,
)
from waiting import until

SOAK = bool(os.environ.get("SOAK"))
SEED = int(os.environ.get("SEED", str(time.time_ns()) if SOAK else "18"))
ORDERS = 200 if SOAK else 24
CONNECTIONS = 500

#: Connections that hang up and connect again all the time.
BRIEF = CONNECTIONS - LASTING


class World:
    """The machine, and what clients may notice of what was done to it."""

    def __init__(
        self, machine: Container, clients: Clients, package: str, order: random.Random
    ) -> None:
        self.machine = machine
        self.clients = clients
        self.package = package
        self.random = order
        self.may_be: Counter[str] = Counter()  # faults

    def systemctl(self, *words: str) -> None:
        """One order may overtake another, which then fails."""
        self.machine.try_run("systemctl", *words)

    # What can happen

    def reload(self) -> None:
        timeout = self.random.randint(100, 1000)
        level = self.random.choice(("info", "warning"))
        text = f'idle_timeout = {timeout}\nlog_level = "{level}"\n'
        self.machine.write(CONFIGURATION, text)
        self.systemctl("reload", SERVICE)

    def reload_invalid_file(self) -> None:
        self.machine.write(CONFIGURATION, "nonsense = 1\n")
        self.systemctl("reload", SERVICE)

    def hang_up(self) -> None:
        self.systemctl("kill", "--kill-whom=main", "--signal=HUP", SERVICE)

    def restart(self) -> None:
        self.systemctl("restart", SERVICE)

    def restart_twice(self) -> None:
        self.systemctl("restart", "--no-block", SERVICE)
        self.systemctl("restart", SERVICE)

    def stop_and_start(self) -> None:
        """Connections are answered and closed; new ones wait in the queue. A stop also empties the
        store, so that there is no last good configuration to start with."""
        self.machine.write(CONFIGURATION, "")
        self.may_be["ended"] += CONNECTIONS + BRIEF
        self.clients.mark()
        self.systemctl("stop", SERVICE)
        self.systemctl("start", SERVICE)
        # One that reads slowly has answers to read before it sees the end.
        until(lambda: self.clients.report().remaining == 0)

    def kill_main_process(self) -> None:
        if pid := main_pid(self.machine):
            self.machine.try_run("kill", "-KILL", str(pid))

    def allow_other_processors(self) -> None:
        processors = self.random.choice(("0", f"0-{(os.cpu_count() or 1) - 1}"))
        if pid := main_pid(self.machine):
            self.machine.try_run(
                "taskset", "--all-tasks", "--cpu-list", "--pid", processors, str(pid)
            )

    def limit_descriptors(self) -> None:
        limit = self.random.choice((1500, 4096, 524288))
        drop_in(self.machine, SERVICE, f"[Service]\nLimitNOFILE={limit}\n")

    def edit_socket(self) -> None:
        ports = self.random.choice(((9999,), (9999, 7777), (7777, 9999)))
        addresses = "".join(f"ListenStream=127.0.0.1:{port}\n" for port in ports)
        drop_in(self.machine, SOCKET, f"[Socket]\nListenStream=\n{addresses}")

    def restart_socket(self) -> None:
        """This closes the queue, with the clients in it."""
        self.may_be.update({"refused": BRIEF, "reset": BRIEF})
        self.systemctl("restart", SOCKET)

    def restart_both(self) -> None:
        self.may_be.update({"refused": BRIEF, "reset": BRIEF})
        self.systemctl("restart", SOCKET, SERVICE)

    def daemon_reload(self) -> None:
        self.systemctl("daemon-reload")

    def daemon_reexec(self) -> None:
        self.systemctl("daemon-reexec")

    def upgrade(self) -> None:
        words = ("apt-get", "install", "--yes", "--reinstall", self.package)
        self.machine.try_run(*words)

    def everything(self) -> list[Callable[[], None]]:
        return [
            self.reload,
            self.reload_invalid_file,
            self.hang_up,
            self.restart,
            self.restart_twice,
            self.stop_and_start,
            self.kill_main_process,
            self.allow_other_processors,
            self.limit_descriptors,
            self.edit_socket,
            self.restart_socket,
            self.restart_both,
            self.daemon_reload,
            self.daemon_reexec,
            self.upgrade,
        ]


def test_random_orders(machine: Container, program: str, package: Path) -> None:
    order = random.Random(SEED)
    done: list[str] = []
    use_own_user(machine)  # with the small limits that it gets, others' would count
    with at_work(machine, program) as clients:
        world = World(machine, clients, f"/mnt/{package.name}", order)
        before = clients.report()
        for _ in range(ORDERS):
            what = order.choice(world.everything())
            done.append(what.__name__)
            what()
            if order.random() < 0.3:
                continue  # the next order follows immediately
            before = settled(world, clients, before, done)
        world.restart_both()
        settled(world, clients, before, done)
        assert machine.run("tcpupper", stdin="after all\n") == "AFTER ALL"


def settled(world: World, clients: Clients, before: Report, done: list[str]) -> Report:
    """Wait until all clients are answered; check what they met since the report `before`."""
    clients.mark()

    def all_is_well() -> Report | None:
        report = clients.report()
        well = not report.waiting and report.open == LASTING and is_active(world.machine)
        return report if well else None

    try:
        report = until(all_is_well, 60)
    except AssertionError as error:
        pytest.fail(f"SEED={SEED}, {done}: {error}\n{clients.report()}\n{state_of(world.machine)}")
    met = Counter(report.faults) - Counter(before.faults) - world.may_be
    assert not met, f"SEED={SEED}, {done}: {dict(met)}\n{state_of(world.machine)}"
    world.may_be.clear()
    return report


def state_of(machine: Container) -> str:
    """What an administrator would look at."""
    status = machine.try_run("systemctl", "status", "--no-pager", SOCKET, SERVICE).stdout
    return f"{status}\n{machine.journal(f'--unit={SERVICE}', '--lines=60')}"


@contextmanager
def at_work(machine: Container, program: str) -> Iterator[Clients]:
    """Clients, all connected."""
    machine.write("/proc/sys/net/ipv4/tcp_wmem", "4096 16384 131072")
    words = (program, "--port=9999", f"--connections={CONNECTIONS}")
    with machine.popen(*words, stdin=PIPE, stdout=PIPE) as process:
        clients = Clients(process)
        try:
            until(lambda: clients.report().open == LASTING)
            yield clients
        finally:
            process.kill()
