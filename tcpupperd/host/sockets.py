"""Listening sockets: those bound here, and what is done with any."""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Self

from tcpupperd.address import Address, parse_address, written
from tcpupperd.errors import ExpectedError

log = logging.getLogger(__name__)

#: Connections that the kernel keeps until they are accepted; net.core.somaxconn caps it. With
#: less, a burst of clients waits for seconds: the kernel drops what does not fit, and the clients
#: try again after 1, 2, 4 ... seconds.
BACKLOG = 4096

#: A program for SO_ATTACH_FILTER (socket(7); linux/filter.h) that drops what asks for a new
#: connection, and lets pass all else: byte 13 of a TCP header has the flags, SYN is 2 (RFC 9293).
_DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_SO_ATTACH_FILTER = 26
_BPF = struct.Struct("HBBI")  # struct sock_filter
_FPROG = struct.Struct("HP")  # struct sock_fprog


class ListenError(ExpectedError):
    """There is no socket to listen on, or one that was passed in cannot be used."""

    status = 71  # EX_OSERR of sysexits.h


def listen(text: str, have: Mapping[str, socket.socket]) -> list[socket.socket]:
    """Sockets that listen on an address: one, or as many as a host name has addresses.

    Of several, those are left out that this host cannot have, as ::1 where IPv6 is switched off;
    those that we `have` already, by what `describe` says of them, are used again.
    """
    address = parse_address(text)
    try:
        if address.path:
            return [_listen_unix(address.path)]
        if not address.host:
            return [_listen_everywhere(address.port)]
        return _listen_all(text, _resolve(address), have)
    except OSError as error:
        raise ListenError(_explain(text, address, error)) from None


def listen_on(server_address: Any) -> socket.socket:
    """A socket that listens on an address as `socketserver` has it: (host, port), or a path."""
    if isinstance(server_address, (str, bytes)):
        return _listen_unix(os.fsdecode(server_address))
    host, port = server_address[:2]
    if not host:
        return _listen_everywhere(port)
    family, where = _resolve(Address(host, port))[0]
    return socket.create_server(where, family=family, backlog=BACKLOG)


def describe(listening: socket.socket) -> str:
    """A listening socket's address as `parse_address` takes it."""
    return written(listening.getsockname())


def refuse(listening: socket.socket) -> None:
    """Begin no new connection; those that wait, or whose handshake is under way, stay.

    To be called by who holds the socket alone: there is no way back. A TCP client tries again
    after a second, and is refused then if the socket has been closed. Where the kernel lets only
    CAP_NET_ADMIN filter a TCP socket (6.18 does), nothing is done.
    """
    if listening.family == socket.AF_UNIX:
        listening.shutdown(socket.SHUT_RD)
    else:
        program = array.array("B", b"".join(_BPF.pack(*step) for step in _DROP_SYN))
        where, _ = program.buffer_info()
        with contextlib.suppress(PermissionError):
            listening.setsockopt(
                socket.SOL_SOCKET, _SO_ATTACH_FILTER, _FPROG.pack(len(_DROP_SYN), where)
            )


def in_handshake(listening: socket.socket) -> bool:
    """Whether a client of a TCP socket is about to be connected: SYN_RECV in /proc/net/tcp."""
    if listening.family == socket.AF_UNIX:
        return False
    port = b":%04X" % listening.getsockname()[1]
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with contextlib.suppress(OSError), open(table, "rb") as lines:
            for line in lines:
                _, address, _, state, *_ = line.split()
                if state == b"03" and address.endswith(port):
                    return True
    return False


def close(listening: Iterable[socket.socket]) -> None:
    """Close sockets that were bound here; a Unix socket's path goes too."""
    for one in listening:
        path = one.getsockname() if one.family == socket.AF_UNIX else ""
        one.close()
        if path and isinstance(path, str):
            with contextlib.suppress(OSError):
                os.unlink(path)


def _resolve(address: Address) -> list[tuple[socket.AddressFamily, Any]]:
    # As bytes, or getaddrinfo would encode even an ASCII name by IDNA, and import all it takes.
    host = address.host.encode() if address.host.isascii() else address.host
    found = socket.getaddrinfo(
        host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return list(dict.fromkeys((family, where) for family, _, _, _, where in found))


def _listen_all(
    text: str,
    addresses: list[tuple[socket.AddressFamily, Any]],
    have: Mapping[str, socket.socket],
) -> list[socket.socket]:
    """Listen on all of the addresses that this host has; one at least."""
    kept = [have[written(where)] for _, where in addresses if written(where) in have]
    addresses = [one for one in addresses if written(one[1]) not in have]
    bound: list[socket.socket] = []
    missing: OSError | None = None
    for family, where in addresses:
        try:
            bound.append(socket.create_server(where, family=family, backlog=BACKLOG))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                close(bound)
                raise
            missing = error
            log.info("%s: not on %s: %s", text, where[0], os.strerror(error.errno))
    if missing and not bound and not kept:
        raise missing
    return kept + bound


def _listen_everywhere(port: int) -> socket.socket:
    """A socket for all addresses, IPv6 and IPv4, or IPv4 only where there is no IPv6."""
    try:
        return socket.create_server(
            ("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True
        )
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
    return socket.create_server(("", port), backlog=BACKLOG)


def _listen_unix(path: str) -> socket.socket:
    """A Unix socket that everyone may connect to who can reach its directory, as with systemd."""
    one = socket.socket(socket.AF_UNIX)
    try:
        try:
            one.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            one.bind(path)
        if not path.startswith("\0"):
            os.chmod(path, 0o666)
        one.listen(BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def _is_stale(path: str) -> bool:
    """Whether a socket file is left from a program that is gone."""
    if path.startswith("\0") or not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED


_REMEDIES = {
    errno.EADDRINUSE: "another program listens there (ss -lp shows it): stop it or choose another",
    errno.EADDRNOTAVAIL: "this host has no such address",
    errno.EACCES: "a port below 1024 needs root or CAP_NET_BIND_SERVICE",
    errno.EAFNOSUPPORT: "not allowed or not supported here; in the sandbox of the service only"
    " sockets that systemd passes in can be used: set the address in tcpupperd.socket",
}

_REMEDIES_FOR_PATHS = _REMEDIES | {
    errno.EACCES: "no permission to create a socket in this directory",
    errno.ENOENT: "the directory does not exist",
}


def _explain(text: str, address: Address, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f'cannot listen on {text}: "{address.host}" cannot be resolved: {error.strerror}'
    if error.errno == errno.EADDRINUSE and _is_other_file(address.path):
        return f"cannot listen on {text}: it exists and is not a socket; choose another path"
    # Not error.strerror: socket.create_server adds the address to it.
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedies = _REMEDIES_FOR_PATHS if address.path else _REMEDIES
    remedy = remedies.get(error.errno or 0)
    return f"cannot listen on {text}: {reason}" + (f"; {remedy}" if remedy else "")


def _is_other_file(path: str) -> bool:
    """Whether there is a file of this name that is not a socket."""
    with contextlib.suppress(OSError):  # it is gone
        return path.startswith("/") and not stat.S_ISSOCK(os.lstat(path).st_mode)
    return False


class Listeners:
    """The listening sockets of the daemon: those passed in, or else those bound here."""

    def __init__(self, passed: list[socket.socket]) -> None:
        self._passed = passed
        self._bound: dict[str, list[socket.socket]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.keep(())

    @property
    def passed(self) -> bool:
        """Whether somebody else holds the sockets too."""
        return bool(self._passed)

    def bind(self, addresses: Iterable[str]) -> None:
        """Listen on these addresses too; on none of them that is new, if one raises ListenError.
        Sockets passed in are never added to."""
        if self._passed:
            return
        before = self._bound
        try:
            for text in addresses:
                if text not in self._bound:
                    have = {describe(one): one for one in self.sockets()}
                    self._bound = self._bound | {text: listen(text, have)}
        except ListenError:
            self.keep(before)
            raise

    def keep(self, addresses: Iterable[str]) -> None:
        """Listen on no others than these any more."""
        close(self._leave_out(addresses))

    def narrow(self, addresses: Iterable[str]) -> None:
        """In a process that shares the sockets: let go of those on other addresses. They listen
        on as long as another process has them, so no path goes."""
        for one in self._leave_out(addresses):
            one.close()

    def sockets(self) -> list[socket.socket]:
        """All of them; each once, though two addresses may mean the same."""
        return self._passed or list(
            dict.fromkeys(one for sockets in self._bound.values() for one in sockets)
        )

    def _leave_out(self, addresses: Iterable[str]) -> list[socket.socket]:
        """Keep these addresses only; the sockets that no longer have one."""
        before = self.sockets() if self._bound else []
        wanted = set(addresses)
        self._bound = {text: found for text, found in self._bound.items() if text in wanted}
        after = self.sockets() if self._bound else []
        return [one for one in before if one not in after]

    def __str__(self) -> str:
        return ", ".join(describe(one) for one in self.sockets())
