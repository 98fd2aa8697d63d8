"""What the kernel says about the memory of this process's control group: cgroups(7)."""

from __future__ import annotations

ROOT = "/sys/fs/cgroup"


def oom_kills() -> int:
    """The number of processes in this control group that the kernel has killed for lack of memory;
    0 if this is unknown, as with version 1 of control groups."""
    try:
        with open("/proc/self/cgroup") as file:
            groups = dict(line.rstrip("\n").split("::", 1) for line in file if "::" in line)
        with open(f"{ROOT}{groups['0']}/memory.events") as file:
            return int(dict(line.split() for line in file)["oom_kill"])
    except (OSError, LookupError, ValueError):
        return 0
