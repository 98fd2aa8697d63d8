"""Files in memory that nobody can change: memfd_create(2)."""

from __future__ import annotations

import fcntl
import os

#: With these seals, nobody can change a memfd any more, not even we: fcntl(2).
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def sealed(content: bytes) -> int:
    """Return a memfd that can be read but not changed."""
    fd = os.memfd_create("tcpupperd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd
