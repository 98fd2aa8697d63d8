"""Random processes of the service are killed, in its sandbox, and no client notices.

SEED=n repeats a sequence, which the output names; SOAK=1 tries others, and longer ones.
"""

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from integration.processes import is_keeper, is_running, kill, worker_of
from load.clients import Clients
from load.kills import GREETING, HEADER, Kills, Processes
from system.container import Container
from system.roots import RELEASES, TESTING
from system.service import CONFIGURATION, SERVICE, is_active, main_pid
from system.test_handover import SMALL_BUFFERS
from system.test_proxy_socket import PROXY
from waiting import until

SOAK = bool(os.environ.get("SOAK"))
SEED = int(os.environ.get("SEED", str(time.time_ns()) if SOAK else "23"))
KILLS = 120 if SOAK else 12

#: Connections, by the port that they are made to and the header that they begin with.
CONNECTIONS = {9999: (500, ""), 9997: (250, HEADER)}

#: What happens to the service at the same time as a kill: an order, or that its main process is
#: killed, too.
ACTIONS = ("reload", "restart", "kill", "")


@pytest.fixture(scope="session", params=(*RELEASES, TESTING))
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("greeting", ["", GREETING], ids=["not greeted", "greeted"])
def test_random_kills(
    machine: Container,
    release: str,
    program: str,
    greeting: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    order = random.Random(SEED)
    machine.write(CONFIGURATION, f'workers = 2\ngreeting = "{greeting}"\n')
    machine.write("/proc/sys/net/ipv4/tcp_wmem", SMALL_BUFFERS)
    machine.run("systemctl", "enable", PROXY)
    machine.run("systemctl", "restart", SERVICE)
    until(lambda: machine.show(PROXY, "ActiveState") == "active")
    with ExitStack() as stack:
        loads = [
            stack.enter_context(at_work(machine, program, port, greeting)) for port in CONNECTIONS
        ]
        kills = Kills(loads, lambda: processes(machine), kill, order)
        kills.settle()
        for number in range(KILLS):
            with during(machine, ACTIONS[number % len(ACTIONS)]):
                kills.kill()
            kills.settle()
            until(lambda: is_active(machine))
        assert [load.finish().faults for load in loads] == [{}, {}]
    journal = machine.journal(f"--unit={SERVICE}")
    assert "Traceback" not in journal
    assert " lost" not in journal
    told = f"{kills.done.total()} kills, longest gap {max(kills.gaps):.2f} s"
    with capsys.disabled():
        print(f"\n{release}: SEED={SEED}: {told}: {dict(kills.done)}")


@contextmanager
def during(machine: Container, action: str) -> Iterator[None]:
    """What is done here happens while a reload or restart begins, or just before a death."""
    if action in ("reload", "restart"):
        command = machine.popen("systemctl", action, SERVICE, stdout=PIPE, stderr=STDOUT)
        yield
        command.communicate(timeout=60)
        return
    yield
    if action == "kill":
        machine.try_run("kill", "-KILL", str(main_pid(machine)))


@contextmanager
def at_work(machine: Container, program: str, port: int, greeting: str) -> Iterator[Clients]:
    """Clients, all connected."""
    connections, header = CONNECTIONS[port]
    words = [program, f"--port={port}", f"--connections={connections}"]
    words += [f"--header={header}"] * bool(header) + [f"--greeting={greeting}"] * bool(greeting)
    with machine.popen(*words, stdin=PIPE, stdout=PIPE) as process:
        try:
            yield Clients(process)
        finally:
            process.kill()


def processes(machine: Container) -> Processes:
    """The workers and keepers of the service, by their numbers outside."""
    group, main = machine.show(SERVICE, "ControlGroup"), str(main_pid(machine))
    pids = set()
    with suppress(OSError):  # there is no group while the service is not running
        listed = Path(f"/proc/{machine.leader}/root/sys/fs/cgroup{group}/cgroup.procs")
        pids = {int(pid) for pid in listed.read_text().split()}
    supervisor = {pid for pid in pids if status(pid, "NSpid")[-1:] == [main]}
    if not supervisor:
        return Processes(frozenset(), {})
    ours = {
        pid for pid in pids if is_running(pid) and {*map(int, status(pid, "PPid"))} == supervisor
    }
    keepers = {pid: worker_of(pid) for pid in ours if is_keeper(pid)}
    return Processes(frozenset(ours - keepers.keys()), keepers)


def status(pid: int, name: str) -> list[str]:
    """A line of /proc/PID/status; nothing of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []
    return next((line.split()[1:] for line in lines if line.startswith(f"{name}:")), [])
