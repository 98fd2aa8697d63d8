"""Processes with a limit of descriptors, which also applies to those in flight."""

import os
import shutil

from integration.processes import cannot


def limited(limit: int) -> list[str]:
    """A command that runs another one with a limit of descriptors. Root is exempt from that of
    descriptors in flight, so it becomes a user of its own, whom file permissions do not concern.
    """
    wrapper = ["prlimit", f"--nofile={limit}:{limit}"]
    if os.geteuid() == 0:
        user = 100_000 + os.getpid() % 100_000
        wrapper += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        wrapper += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    for program in {"prlimit", "setpriv"}.intersection(wrapper):
        if not shutil.which(program):
            cannot(f"there is no {program}")
    return wrapper
