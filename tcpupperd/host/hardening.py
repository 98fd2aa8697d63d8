"""Protection that a process has to request from the kernel."""

from __future__ import annotations

import ctypes

#: An operation of prctl(2), for which Python has no function.
PR_SET_DUMPABLE = 4


def protect_memory() -> None:
    """Prevent other processes of the same user from reading or writing this process's memory.

    Forked processes inherit this. Their files in /proc then belong to root, and they dump no core,
    or only one that root alone can read.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, *(ctypes.c_ulong(0) for _ in range(4))):
        raise OSError(ctypes.get_errno(), "prctl")
