"""Files in memory that no other process can change: memfd_create(2)."""

from __future__ import annotations

import fcntl
import mmap
import os

#: With these seals, a memfd cannot be changed any more, not even by its creator: fcntl(2).
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

#: A seal in fcntl(2) since Linux 5.1: only existing mappings can be written to. Python 3.11 has no
#: name for it.
F_SEAL_FUTURE_WRITE = 0x10


def sealed(content: bytes) -> int:
    """Return a memfd that can be read but not changed. Raises OSError."""
    fd = os.memfd_create("outlive", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_sealed(fd: int, size_max: int) -> bytes:
    """The content of a memfd created by `sealed`. Raises OSError or ValueError for another
    file."""
    seals: int = fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # OSError if it is not a memfd
    if seals & SEALS != SEALS:
        raise ValueError("it is not sealed")
    size = os.fstat(fd).st_size
    if size > size_max:
        raise ValueError(f"it is larger than {size_max} bytes")
    return os.pread(fd, size, 0)


def published(size: int) -> tuple[mmap.mmap, mmap.mmap]:
    """Return two views of the same memory: one to write to, and one to read, which no process can
    make writable. `withhold` the first one before forking. Raises OSError."""
    fd = os.memfd_create("outlive", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, size)
        ours = mmap.mmap(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        return ours, mmap.mmap(fd, size, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def withhold(view: mmap.mmap) -> None:
    """Withhold this view from processes that are forked from now on: madvise(2). They must not use
    the object, because they do not have its memory."""
    view.madvise(mmap.MADV_DONTFORK)
