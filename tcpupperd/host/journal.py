"""The journal's native protocol, without blocking.

It is documented in systemd's JOURNAL_NATIVE_PROTOCOL.md, for programs that do not use libsystemd.
Libraries are not an option: systemd's own and those on PyPI use a blocking socket and hang if the
journal hangs.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Mapping
from time import monotonic, sleep

from outlive.memfd import sealed
from outlive.send_queue import send_queue

#: Where the journal receives entries.
SOCKET = "/run/systemd/journal/socket"

#: Where the packaged unit mounts that socket. With LogNamespace=, systemd provides another one in
#: the original place, which then receives the entries.
MOUNTED = "/run/host-journal"

#: Bytes to request for entries that the journal has not read yet, as libsystemd does; the kernel
#: grants up to net.core.wmem_max.
BUFFER = 8 << 20

#: Seconds between checks whether the journal has read anything; there is no event for this.
FLUSH_TICK = 0.001

#: The errors for an entry that is too large for a datagram.
TOO_LARGE = {errno.EMSGSIZE, errno.ENOBUFS}

_SIZE = struct.Struct("<Q")
_FD = struct.Struct("i")


def encode(fields: Mapping[str, object]) -> bytes:
    """An entry in the native protocol. A value may contain anything and cannot be mistaken for
    another field: if it contains a newline, it is preceded by its length."""
    text = "".join(f"{name}={value}\n" for name, value in fields.items())
    if text.count("\n") == len(fields):  # nearly always; the alternative takes much longer
        return text.encode(errors="backslashreplace")
    return b"".join(_assignment(name.encode(), value) for name, value in fields.items())


def _assignment(name: bytes, value: object) -> bytes:
    data = str(value).encode(errors="backslashreplace")
    if b"\n" in data:
        return b"%s\n%s%s\n" % (name, _SIZE.pack(len(data)), data)
    return b"%s=%s\n" % (name, data)


class Journal:
    """The journal's socket."""

    def __init__(self) -> None:
        # Not connected, so that entries also reach a journal that is started later.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        mounted = os.path.exists(MOUNTED) and not os.path.exists(SOCKET)
        self._address = MOUNTED if mounted else SOCKET

    def send(self, fields: Mapping[str, object]) -> None:
        """Send an entry without blocking. Raises BlockingIOError if the journal is not keeping up,
        and another OSError if there is no journal."""
        data = encode(fields)
        try:
            self._socket.sendto(data, socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            if error.errno not in TOO_LARGE:
                raise
            self._send_file(data)

    def flush(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the journal to handle what was sent; return whether it
        has done so.

        The journal looks up the unit of an entry's process when it handles the entry, so a process
        whose last entry matters should not exit earlier (systemd issue 2913). An empty datagram,
        which the journal ignores, shows how far it has got: it reads them one by one.
        """
        until = monotonic() + timeout
        try:
            self._socket.sendto(b"", socket.MSG_DONTWAIT, self._address)
            while send_queue(self._socket):  # not read yet
                if monotonic() > until:
                    return False
                sleep(FLUSH_TICK)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send_file(self, data: bytes) -> None:
        """Send an entry in a file, which the journal accepts only if it can no longer change."""
        file = sealed(data)
        try:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(file))
            self._socket.sendmsg([], [rights], socket.MSG_DONTWAIT, self._address)
        finally:
            os.close(file)
