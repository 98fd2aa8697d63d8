"""Information of the kernel about a tree of processes, proc(5)."""

import os
from collections.abc import Iterable
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []  # it has just exited


def name(pid: int) -> str:
    """What the process is called, "" if it has just exited."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def tree(pid: int) -> list[int]:
    """``pid`` and all its running descendants."""
    return [pid, *(grandchild for child in children(pid) for grandchild in tree(child))]


def cpu_seconds(pid: int) -> float:
    """CPU time of ``pid``, its descendants, and their children that were waited for."""
    return sum(map(_cpu_ticks, tree(pid))) / TICKS_PER_SECOND


def _cpu_ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just exited; the next reading finds its time with its parent
    utime, stime, cutime, cstime = stat.rpartition(")")[2].split()[11:15]
    return int(utime) + int(stime) + int(cutime) + int(cstime)


def private_bytes(pids: Iterable[int]) -> int:
    """Memory that no other process shares, which their exit would free."""
    lines = (line for pid in pids for line in _smaps_rollup(pid) if line.startswith("Private_"))
    return 1024 * sum(int(line.split()[1]) for line in lines)


def _smaps_rollup(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()


def count_sockets(pid: int) -> int:
    return sum(map(_is_socket, Path(f"/proc/{pid}/fd").iterdir()))


def _is_socket(descriptor: Path) -> bool:
    try:
        return os.readlink(descriptor).startswith("socket:")
    except FileNotFoundError:
        return False  # it was just closed
