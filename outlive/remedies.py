"""Remedies for errors that the operating system reports because a resource has run out, or because
the administrator has forbidden something. None of these errors is a bug."""

from __future__ import annotations

import errno

_MEMORY = "free memory, or raise MemoryMax= in the unit"
_FORBIDDEN = "the unit's sandbox or a security module forbids it"
_DESCRIPTORS = "raise RLIMIT_NOFILE: LimitNOFILE= in the unit"

_REMEDIES = {
    errno.EMFILE: _DESCRIPTORS,
    # A user may have as many descriptors in flight as a process may have open: unix(7).
    errno.ETOOMANYREFS: f"{_DESCRIPTORS}, which also limits the descriptors in flight",
    errno.ENFILE: "raise the sysctl fs.file-max",
    errno.EFBIG: "raise RLIMIT_FSIZE: LimitFSIZE= in the unit",
    errno.ENOSPC: _MEMORY,
    errno.ENOMEM: _MEMORY,
    errno.ENOBUFS: _MEMORY,
    errno.EPERM: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
}


def remedy(error: BaseException) -> str:
    """The remedy, as a parenthesis that follows the error in a message; "" if there is none."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    found = _REMEDIES.get(number or 0)
    return f" ({found})" if found else ""
