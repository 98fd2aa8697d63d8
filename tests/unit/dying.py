"""Processes that stop or die at a chosen line of the program, and share their descriptors with the
test, as a worker does with the process that outlives it."""

import ctypes
import os
import platform
import signal
from collections.abc import Callable

import pytest

from lines import before_line

#: The system call of clone(2), whose only argument here is its first, on each architecture.
NUMBERS = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "ppc64le": 120, "armv7l": 120}
CLONE_FILES = 0x400


class Process:
    """Runs a function until it comes to a line, counted from 1, of the files named; there it
    stops. It is not to return anything: with the memory, that is lost."""

    def __init__(self, run: Callable[[], object], line: int, files: tuple[str, ...]) -> None:
        self._pid = forked_with_shared_descriptors()
        if not self._pid:
            status = 1
            try:
                stop_at(line, files)
                run()
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(self._pid, os.WUNTRACED)
        self._is_stopped = os.WIFSTOPPED(status)
        assert self._is_stopped or os.waitstatus_to_exitcode(status) == 0

    def kill(self) -> bool:
        """Kill it where it stopped; False if it has come to its end."""
        return self._end(signal.SIGKILL) == -signal.SIGKILL

    def finish(self) -> None:
        """Let it run to its end."""
        assert self._end(signal.SIGCONT) == 0

    def _end(self, number: int) -> int:
        """The exit status after a signal, if it has stopped."""
        if not self._is_stopped:
            return 0
        self._is_stopped = False
        os.kill(self._pid, number)
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status)


def forked_with_shared_descriptors() -> int:
    """As os.fork, with one table of descriptors for both."""
    number = NUMBERS.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of clone(2) on {platform.machine()} is not known here")
    python, libc = ctypes.pythonapi, ctypes.PyDLL(None)
    libc.syscall.restype = ctypes.c_long
    rest = (ctypes.c_long(0),) * 4
    python.PyOS_BeforeFork()
    pid = libc.syscall(ctypes.c_long(number), ctypes.c_long(CLONE_FILES | signal.SIGCHLD), *rest)
    if pid:
        python.PyOS_AfterFork_Parent()
    else:
        python.PyOS_AfterFork_Child()
    assert pid >= 0
    return int(pid)


def stop_at(line: int, files: tuple[str, ...]) -> None:
    """Stop this process before it runs a line."""
    before_line(
        line, lambda path: path.endswith(files), lambda: os.kill(os.getpid(), signal.SIGSTOP)
    )
