"""The examples of outlive with real units: restarts, mistakes, upgrades and stops under load.

With SOAK=1, there are 2,000 connections and more restarts, and what the clients saw is printed.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from load.numbered import SLOW, Numbered, Report
from system.build import both
from system.container import Container
from system.roots import RELEASES, TESTING
from system.test_handover import SMALL_BUFFERS
from system.test_package import with_version
from waiting import until

SOAK = bool(os.environ.get("SOAK"))
CONNECTIONS, RESTARTS = (2000, 20) if SOAK else (500, 4)
PORTS = {"counter": 7001, "acounter": 7002}
SHARE = "/usr/share/doc/python3-outlive/examples"

pytestmark = [
    pytest.mark.parametrize("release", [*RELEASES, TESTING], indirect=True),
    pytest.mark.parametrize("name", PORTS),
]


@pytest.fixture
def counter(bare_machine: Container, package: Path, name: str) -> Container:
    """A machine on which an example runs, as its users install it."""
    _, library = both(package)
    bare_machine.run("apt-get", "install", "--yes", f"/mnt/{library.name}")
    bare_machine.run("mkdir", f"/usr/local/lib/{name}")
    bare_machine.run("cp", f"{SHARE}/{name}.py", f"/usr/local/lib/{name}")
    bare_machine.run("cp", f"{SHARE}/{name}.service", "/etc/systemd/system")
    bare_machine.run("cp", f"{SHARE}/{name}.socket", "/etc/systemd/system")
    bare_machine.write(f"/etc/{name}.toml", "")
    bare_machine.run("systemctl", "daemon-reload")
    bare_machine.run("systemctl", "start", f"{name}.socket")
    return bare_machine


@contextmanager
def at_work(machine: Container, name: str, connections: int = CONNECTIONS) -> Iterator[Numbered]:
    """Clients, all connected."""
    machine.write("/proc/sys/net/ipv4/tcp_wmem", SMALL_BUFFERS)
    program = "/mnt/tcpupperd/tests/load/numbered.py"
    words = ("python3", program, "127.0.0.1", str(PORTS[name]), str(connections))
    process = machine.popen(*words, stdin=PIPE, stdout=PIPE)
    with Numbered(process, connections) as load:
        yield load


@pytest.fixture
def nothing_is_lost(
    release: str, name: str, capsys: pytest.CaptureFixture[str]
) -> Callable[[Numbered], None]:
    """Ends the clients, and compares what they saw."""

    def nothing_is_lost(load: Numbered) -> None:
        report = load.finish()
        if SOAK:
            with capsys.disabled():
                print(f"\n{release}, {name}: {report}")
        assert report.faults == {}
        assert report.open == load.connections
        assert report.visits

    return nothing_is_lost


def main_pid(machine: Container, name: str) -> str:
    return machine.show(f"{name}.service", "MainPID")


def restart(machine: Container, name: str) -> None:
    before = main_pid(machine, name)
    machine.run("systemctl", "restart", f"{name}.service")
    assert main_pid(machine, name) not in ("0", before)


def complaints(machine: Container, name: str) -> list[str]:
    """What the service has logged besides its restarts."""
    lines = machine.journal("--output=cat", f"_SYSTEMD_UNIT={name}.service").splitlines()
    usual = re.compile(r"left \d+ connections? for the next process")
    return [line for line in lines if not usual.fullmatch(line)]


def test_restarts(counter: Container, name: str, nothing_is_lost: Callable[..., None]) -> None:
    with at_work(counter, name) as load:
        for _ in range(RESTARTS):
            restart(counter, name)
            load.go_on()
        nothing_is_lost(load)
    assert counter.show(f"{name}.service", "NFileDescriptorStore") in ("3", "4")
    assert complaints(counter, name) == []


def test_restarts_without_a_pause(
    counter: Container, name: str, nothing_is_lost: Callable[..., None]
) -> None:
    """Some come before the program has begun, two at a time."""
    with at_work(counter, name) as load:
        unit = f"{name}.service"
        for _ in range(12):
            both = f"systemctl restart {unit} & systemctl restart {unit}; wait"
            counter.run("sh", "-c", both)
        load.go_on()
        nothing_is_lost(load)


def test_mistake_in_the_settings(
    counter: Container, name: str, nothing_is_lost: Callable[..., None]
) -> None:
    with at_work(counter, name) as load:
        counter.write(f"/etc/{name}.toml", "prefix = ")
        assert counter.try_run("systemctl", "reload", f"{name}.service").returncode
        restart(counter, name)
        text = counter.show(f"{name}.service", "StatusText")
        assert text == f"/etc/{name}.toml is invalid; using the last good configuration"
        load.go_on()
        counter.write(f"/etc/{name}.toml", "")
        counter.run("systemctl", "reload", f"{name}.service")
        until(lambda: counter.show(f"{name}.service", "StatusText") == "")
        nothing_is_lost(load)


def test_upgrade_of_the_library(
    counter: Container, package: Path, name: str, nothing_is_lost: Callable[..., None]
) -> None:
    _, library = both(package)
    [newer] = with_version(counter, [f"/mnt/{library.name}"], "+newer")
    with at_work(counter, name) as load:
        for file in (newer, f"/mnt/{library.name}"):
            counter.run("apt-get", "install", "--yes", "--allow-downgrades", file)
            load.go_on()
            restart(counter, name)
            load.go_on()
        nothing_is_lost(load)


def test_stop_closes_all_and_resets_none(counter: Container, name: str) -> None:
    with at_work(counter, name) as load:
        counter.run("systemctl", "stop", f"{name}.service")
        until(lambda: load.report().open == 0)
        faults = load.report().faults
        assert faults.pop("reset", 0) <= CONNECTIONS // SLOW  # too slow for the time of a stop
        assert faults.keys() == {"ended"}
    assert counter.show(f"{name}.service", "Result") == "success"


def test_without_a_store_a_restart_is_a_stop(counter: Container, name: str) -> None:
    drop_in(counter, name, "FileDescriptorStoreMax=0")
    with at_work(counter, name) as load:
        restart(counter, name)
        until(lambda: load.report().open == 0)
        faults = load.report().faults
        assert faults.pop("reset", 0) <= CONNECTIONS // SLOW
        assert faults.keys() == {"ended"}


def test_small_limit_of_descriptors(
    counter: Container, name: str, nothing_is_lost: Callable[..., None]
) -> None:
    """Those that are connected are restarted; the others wait all the time."""
    # The kernel counts the descriptors in flight by user: not those of another machine's test.
    drop_in(counter, name, f"LimitNOFILE=512\nUser={name}-{os.getpid()}")
    with at_work(counter, name, 300) as load:
        counter.run("systemctl", "start", f"{name}.service")
        for _ in range(RESTARTS):
            restart(counter, name)
            load.go_on()
        nothing_is_lost(load)


def test_hung_process_is_replaced(counter: Container, name: str) -> None:
    """Its own connections are lost with it, but none that comes later."""
    drop_in(counter, name, "WatchdogSec=1")
    counter.run("systemctl", "start", f"{name}.service")
    before = main_pid(counter, name)
    counter.run("systemctl", "kill", "--signal=STOP", f"{name}.service")
    until(lambda: main_pid(counter, name) not in ("0", before))
    with at_work(counter, name, 100) as load:
        restart(counter, name)
        load.go_on()
        report: Report = load.finish()
    assert report.faults == {}


def drop_in(machine: Container, name: str, line: str) -> None:
    """Add a line to the service."""
    machine.write(f"/etc/systemd/system/{name}.service.d/test.conf", f"[Service]\n{line}\n")
    machine.run("systemctl", "daemon-reload")
