"""Connections outlive processes: reload, restart, upgrade and a killed daemon, under load.

Thousands of clients are at work meanwhile, see tests/load/clients.c. With SOAK=1 each action is
done often enough to be believed, and the pauses that the clients saw are printed.
"""

import fcntl
import os
import resource
import shutil
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from load.clients import LASTING, Clients
from system.build import both, build_previous_package
from system.container import Container
from system.service import SERVICE, SOCKET, is_active, main_pid, use_own_user, workers
from system.test_package import with_version
from waiting import until

SOAK = bool(os.environ.get("SOAK"))
CONNECTIONS = 5000 if SOAK else 2000

#: What one worker can hold where the limit of descriptors cannot be raised, in steps of 500.
MANY = min(16_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 500 * 500 - 500)

#: Answers that wait in the kernel do not wait in the daemon: by default two megabytes of them.
SMALL_BUFFERS = "4096 16384 131072"

Tell = Callable[[str, list[float]], None]


@pytest.fixture
def previous(release: str, package: Path, tmp_path: Path) -> list[str]:
    """The packages of the commit before the last, where they are inside: the handover may have
    another version there."""
    folder = package.parent / "previous"
    folder.mkdir()
    for path in both(build_previous_package(release, tmp_path)):
        shutil.copy(path, folder)
    return [f"/mnt/previous/{path.name}" for path in folder.iterdir()]


@pytest.fixture
def tell(release: str, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Prints the pauses that the clients saw at each of several actions."""

    def tell(action: str, pauses: list[float]) -> None:
        if SOAK:
            median, longest = statistics.median(pauses), max(pauses)
            with capsys.disabled():
                print(
                    f"\n{release}: {action}, {len(pauses)} times, longest pause of a client:"
                    f" median {median:.3f} s, maximum {longest:.3f} s"
                )

    return tell


def test_reload(machine: Container, program: str, tell: Tell) -> None:
    with at_work(machine, program) as clients:
        tell("reload", [pause(clients, reload, machine) for _ in times(5, 100)])
        assert clients.finish().faults == {}
    assert complaints(machine) == ""


def test_restart(machine: Container, program: str, tell: Tell) -> None:
    with at_work(machine, program) as clients:
        tell("restart", [pause(clients, restart, machine) for _ in times(5, 50)])
        assert clients.finish().faults == {}
    assert complaints(machine) == ""


def test_downgrade_and_upgrade(
    machine: Container, program: str, package: Path, previous: list[str], tell: Tell
) -> None:
    """Between this package and that of the commit before; their versions may be the same."""
    older = with_version(machine, previous, "~older")
    newer = [f"/mnt/{path.name}" for path in both(package)]
    with at_work(machine, program) as clients:
        pauses = [
            pause(clients, install_version, machine, files)
            for _ in times(1, 10)
            for files in (older, newer)
        ]
        tell("apt install of an older and a newer package", pauses)
        assert clients.finish().faults == {}
    assert complaints(machine) == ""


def test_killed_main_process(machine: Container, program: str, tell: Tell) -> None:
    with at_work(machine, program) as clients:
        tell("kill -9", [pause(clients, kill, machine) for _ in times(2, 10)])
        assert clients.finish().faults == {}


def test_stop_and_start(machine: Container, program: str, tell: Tell) -> None:
    """A stop ends connections, but no sooner than they have their answers, and never by a reset;
    new ones wait in the socket, which stays."""
    with at_work(machine, program) as clients:
        tell(
            "stop and start",
            [pause(clients, stop_and_start, machine, clients) for _ in times(2, 10)],
        )
        report = clients.finish()
    assert report.ended >= CONNECTIONS
    assert report.faults.keys() == {"ended"}
    assert complaints(machine) == ""


@pytest.mark.usefixtures("alone")
def test_many_connections(machine: Container, program: str, tell: Tell) -> None:
    """As many as one process may open here. No client gets more than one turn in five seconds, or
    on a small machine the load alone would take all the time there is."""
    with at_work(machine, program, MANY, pace=5) as clients:
        pauses = [pause(clients, restart, machine) for _ in times(1, 3)]
        tell(f"restart with {MANY} connections", pauses)
        assert clients.report().open == MANY // 500 * LASTING
        assert clients.finish().faults == {}
    assert complaints(machine) == ""


@pytest.fixture
def alone(machine: Container) -> Iterator[None]:
    """No other part of the system tests has so many connections at the same time."""
    use_own_user(machine)
    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def at_work(
    machine: Container, program: str, connections: int = CONNECTIONS, pace: int = 1
) -> Iterator[Clients]:
    """Clients, all connected, each of which does something every `pace` seconds.

    Whatever is done to the service meanwhile, the socket unit must not notice.
    """
    machine.write("/proc/sys/net/ipv4/tcp_wmem", SMALL_BUFFERS)
    socket_run = machine.show(SOCKET, "InvocationID")
    words = (program, "--port=9999", f"--connections={connections}", f"--round={pace}")
    with machine.popen(*words, stdin=PIPE, stdout=PIPE) as process:
        clients = Clients(process)
        try:
            all_are_open(clients, connections)
            yield clients
        finally:
            process.kill()
    assert machine.show(SOCKET, "InvocationID") == socket_run


def all_are_open(clients: Clients, connections: int) -> None:
    until(lambda: clients.report().open == connections // 500 * LASTING)


def pause(clients: Clients, action: Callable[..., None], *arguments: Any) -> float:
    """The longest that any client waited for an answer while something was done, in seconds."""
    clients.report()
    action(*arguments)
    silences = [clients.mark().silence]

    def all_have_heard() -> bool:
        report = clients.report()
        silences.append(report.silence)
        return not report.waiting

    until(all_have_heard)
    return max(silences)


def reload(machine: Container) -> None:
    before = workers(machine)
    machine.run("systemctl", "reload", SERVICE)
    until(lambda: not workers(machine) & before)


def restart(machine: Container) -> None:
    before = main_pid(machine)
    machine.run("systemctl", "restart", SERVICE)
    assert main_pid(machine) != before


def install_version(machine: Container, files: list[str]) -> None:
    before = main_pid(machine)
    machine.run("apt-get", "install", "--yes", "--allow-downgrades", *files)
    assert main_pid(machine) != before


def kill(machine: Container) -> None:
    restarts = int(machine.show(SERVICE, "NRestarts"))
    machine.run("kill", "-KILL", str(main_pid(machine)))
    until(lambda: int(machine.show(SERVICE, "NRestarts")) == restarts + 1)
    until(lambda: is_active(machine))


def stop_and_start(machine: Container, clients: Clients) -> None:
    clients.mark()
    machine.run("systemctl", "stop", SERVICE)
    machine.run("systemctl", "start", SERVICE)
    until(lambda: clients.report().remaining == 0)
    all_are_open(clients, CONNECTIONS)


def complaints(machine: Container) -> str:
    """What the service and the service manager found worth a warning."""
    return machine.journal(f"--unit={SERVICE}", "--priority=warning")


def times(short: int, full: int) -> range:
    return range(full if SOAK else short)
