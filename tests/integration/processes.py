"""Facts about processes from /proc (proc(5))."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from waiting import until

PROC = Path("/proc")


def cannot(why: str) -> NoReturn:
    """Skip a test that lacks a prerequisite; see tests/conftest.py for where that is a failure."""
    pytest.skip(why)


def children(pid: int) -> list[int]:
    """The children of a process, including zombies; none if it has exited."""
    try:
        return [int(child) for child in _read(pid, f"task/{pid}/children").split()]
    except OSError:
        return []


def state(pid: int) -> str:
    """The letter that ps(1) shows: "S" sleeps, "T" is stopped, "Z" is a zombie; "" if it has
    exited."""
    try:
        return _read(pid, "stat").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Whether a process still runs, asleep or stopped."""
    return state(pid) not in ("", "Z")


def is_keeper(pid: int) -> bool:
    """Whether a process is the keeper of a worker."""
    try:
        return _read(pid, "comm") == "tcpupperd-keep\n"
    except OSError:
        return False


def worker_of(keeper: int) -> int:
    """The worker of a keeper, which has a pidfd of it; 0 or less if it is dead."""
    with contextlib.suppress(OSError):
        for fd, target in descriptors(keeper).items():
            if target == "anon_inode:[pidfd]":
                found = re.search(
                    r"^Pid:\s*(-?[0-9]+)$", _read(keeper, f"fdinfo/{fd}"), re.MULTILINE
                )
                return int(found[1]) if found else 0
    return 0


def kill(pid: int, number: int) -> None:
    """Send a signal to a process, and wait until it is dead, unless it is a keeper that blocks
    the signal."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just exited
        os.kill(pid, number)
        until(lambda: not is_running(pid) or (is_keeper(pid) and _is_blocked(pid, number)))


def _is_blocked(pid: int, number: int) -> bool:
    found = re.search(r"^SigBlk:\s*([0-9a-f]+)$", _read(pid, "status"), re.MULTILINE)
    assert found
    return bool(int(found[1], 16) >> number - 1 & 1)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """A context manager that suspends processes."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: all(state(pid) == "T" for pid in pids))
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def started(pid: int) -> float:
    """When a process started, in seconds of CLOCK_BOOTTIME."""
    ticks = int(_read(pid, "stat").rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def marked(mark: str) -> list[int]:
    """The processes whose environment contains `mark` (a zombie has none)."""
    found = []
    for entry in PROC.iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def cpu_time(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(pid: int) -> dict[int, str]:
    """The open descriptors of a process, each with what it leads to, as ls -l shows it."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has just been closed
                found[int(entry.name)] = os.readlink(entry)
    return found


def flags(pid: int, fd: int) -> int:
    """The open flags of a descriptor: O_CLOEXEC, O_NONBLOCK, ..."""
    return int(_read(pid, f"fdinfo/{fd}").partition("flags:")[2].split()[0], 8)


def polled_for(pid: int, fd: int) -> int:
    """The events that a process waits for on one of its descriptors, in any epoll of its own."""
    for epoll, target in descriptors(pid).items():
        if target == "anon_inode:[eventpoll]":
            entries = _read(pid, f"fdinfo/{epoll}")
            if found := re.search(rf"^tfd: +{fd} events: +([0-9a-f]+) ", entries, re.MULTILINE):
                return int(found[1], 16)
    return 0


def socket_inode(local_port: int, remote_port: int) -> int:
    """The inode of the TCP socket between two ports; 0 while it waits to be accepted."""
    ends = rf"\w+:{local_port:04X} \w+:{remote_port:04X}"
    # A socket in TIME_WAIT has none.
    row = re.compile(rf"^ *\d+: {ends}(?: +\S+){{6}} +([1-9]\d*) ", re.MULTILINE)
    for table in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):
            if found := row.search((PROC / table).read_text()):
                return int(found[1])
    return 0


def listening_addresses(pid: int) -> list[str]:
    """Where a process listens for TCP, as the daemon writes addresses."""
    opened = set(descriptors(pid).values())
    found = []
    for table, form in (("net/tcp", "127.0.0.1:{}"), ("net/tcp6", "[::1]:{}")):
        for row in (PROC / table).read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in opened:  # TCP_LISTEN
                found.append(form.format(int(fields[1].rpartition(":")[2], 16)))
    return found


def _read(pid: int, name: str) -> str:
    return (PROC / str(pid) / name).read_text()
