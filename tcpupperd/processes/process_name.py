"""What other programs show about this process: its name and its command line."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

from tcpupperd.serving import fast_path

if fast_path.fast_path is fast_path.python_fast_path:
    import ctypes  # now, because of upgrades: see `library`

#: An operation of prctl(2).
PR_SET_NAME = 15

NAME, LINE, STATUS = "/proc/self/comm", "/proc/self/cmdline", "/proc/self/stat"


@contextlib.contextmanager
def shown_as(name: str, line: str) -> Iterator[None]:
    """Change the name, which `ps -o comm` and top(1) show, and the command line, which ps(1) and
    `systemctl status` show. What is forked meanwhile keeps them."""
    this, name_before, line_before = os.getpid(), _read(NAME)[:-1], _read(LINE)
    _show(name.encode(), line.encode())
    try:
        yield
    finally:
        if os.getpid() == this:
            _show(name_before, line_before)


def show_line(line: str) -> None:
    """Change the command line, for good."""
    _show(_read(NAME)[:-1], line.encode())


def _show(name: bytes, line: bytes) -> None:
    # prctl(2) can replace the line (PR_SET_MM), but only with CAP_SYS_RESOURCE. It is overwritten
    # instead. Its last byte stays NUL: otherwise, the kernel adds the environment.
    address, size = _arguments()
    line = line[: max(size - 1, 0)].ljust(size, b"\0")
    if fast_path.fast_path is not fast_path.python_fast_path:
        from tcpupperd.serving import _fast_path

        _fast_path.show(name, address, line)
        return
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, *(ctypes.c_ulong(0) for _ in range(3)))
    ctypes.memmove(address, line, size)


@functools.cache
def _arguments() -> tuple[int, int]:
    """The address and size of the arguments that this process was started with: arg_start and
    arg_end in proc(5). The size is 0 if they are unknown, as in emulators."""
    fields = _read(STATUS).rpartition(b")")[2].split()
    start, end = map(int, fields[45:47] or (0, 0))
    return (start, end - start) if start and end - start == len(_read(LINE)) else (0, 0)


def _read(path: str) -> bytes:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""
