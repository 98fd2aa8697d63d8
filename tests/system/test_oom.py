"""The kernel kills a worker for lack of memory, and its other connections continue.

This is a real kill by the kernel, in a control group that contains all processes of the service.
Where the host has the older control groups, systemd does not hear of it, and the daemon cannot
tell it from any other SIGKILL (memory.events is missing there), so that connections with an
incomplete line, which would be reset otherwise, continue as well.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from system.container import Container
from system.service import CONFIGURATION, SERVICE, Conversation, answer, drop_in, main_pid, workers
from waiting import until

#: Two workers, of which one can be made to hold a gigabyte.
SETTINGS = "workers = 2\nmax_line = 1000000000\nline_timeout = 0\n"

#: Sends a line without end, for as long as it is taken, and lines over other connections before
#: and after that.
HOG = """
import socket

def ask(one, text):
    one.sendall(text)
    return one.makefile("rb").readline() == text.upper()

others = [socket.create_connection(("localhost", 9999)) for _ in range(50)]
assert all(ask(one, b"one\\n") for one in others)
with socket.create_connection(("localhost", 9999)) as connection:
    try:
        while True:
            connection.sendall(b"x" * 65536)
    except ConnectionResetError:
        print("reset,", sum(ask(one, b"two\\n") for one in others), "continue")
"""

LIMIT = 100 << 20
MEMORY = Path("/sys/fs/cgroup/memory")


def test_worker_killed_for_want_of_memory(machine: Container) -> None:
    # systemd itself hears of it only where it manages memory.
    assert machine.show(SERVICE, "OOMPolicy") == "continue"
    machine.write(CONFIGURATION, SETTINGS)
    machine.run("systemctl", "restart", SERVICE)
    until(lambda: len(workers(machine)) == 2)
    pid, before = main_pid(machine), workers(machine)
    victim, other = sorted(before)
    machine.run("kill", "-STOP", str(victim))
    bystander = Conversation(machine)
    assert bystander.ask("one") == "ONE"
    machine.run("kill", "-CONT", str(victim))

    with memory_limit(machine):
        machine.run("kill", "-STOP", str(other))
        assert machine.run("python3", "-c", HOG) == "reset, 50 continue"
        machine.run("kill", "-CONT", str(other))
        until(lambda: victim not in workers(machine) and len(workers(machine)) == 2)

    assert bystander.ask("two") == "TWO"
    assert bystander.end() == ""
    assert answer(machine, "three\n") == "THREE"
    assert main_pid(machine) == pid
    assert machine.show(SERVICE, "NRestarts") == "0"
    journal = machine.journal(f"--unit={SERVICE}", "--priority=warning")
    died = f"worker {victim} was killed by SIGKILL (out of memory?); 51 connections left"
    assert f"{died} to its keeper" in journal
    assert f"1 connection of worker {victim} lost" in journal
    assert journal.count(" lost") == 1


@contextmanager
def memory_limit(machine: Container) -> Iterator[None]:
    """Limit the memory of the service. Where the host has the older control groups, systemd has no
    way to inside of the unified one."""
    if not MEMORY.is_dir():
        drop_in(machine, SERVICE, f"[Service]\nMemoryMax={LIMIT}\nMemorySwapMax=0\n")
        yield
        return
    group = MEMORY / f"tcpupperd-{os.getpid()}-{os.urandom(4).hex()}"
    group.mkdir()
    unit = machine.show(SERVICE, "ControlGroup")
    pids = machine.run("cat", f"/sys/fs/cgroup{unit}/cgroup.procs").split()
    inside = [str(outer) for outer, inner in numbers(machine) if str(inner) in pids]
    try:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        move(inside, group)
        yield
        assert "oom_kill 1\n" in (group / "memory.oom_control").read_text()
    finally:
        move((group / "cgroup.procs").read_text().split(), MEMORY)
        group.rmdir()


def move(pids: list[str], group: Path) -> None:
    for pid in pids:
        (group / "cgroup.procs").write_text(pid)


def numbers(machine: Container) -> Iterator[tuple[int, int]]:
    """The numbers of the processes in a container: on the host, and inside."""
    namespace = os.readlink(f"/proc/{machine.leader}/ns/pid")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns/pid") == namespace:
                status = (entry / "status").read_text()
                row = next(line for line in status.splitlines() if line.startswith("NSpid"))
                yield int(entry.name), int(row.split()[-1])
        except OSError:  # it has just ended
            continue
