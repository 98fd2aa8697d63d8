"""What a process does for its own protection, where the kernel needs to be asked."""

from __future__ import annotations

import ctypes

#: Of prctl(2), for which Python has no function.
PR_SET_DUMPABLE = 4


def close_memory() -> None:
    """Let no other process of the same user read or write the memory of this one.

    Processes that are forked inherit it. What proc(5) has of them belongs to root from now on, and
    they dump no core, or for root alone.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, *(ctypes.c_ulong(0) for _ in range(4))):
        raise OSError(ctypes.get_errno(), "prctl")
