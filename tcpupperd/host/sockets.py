"""Listening sockets: binding, preparing, accepting, closing."""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import outlive.listener
from tcpupperd.address import SERVICES, UPPER, Address, parse_address, split_service
from tcpupperd.errors import ExpectedError
from tcpupperd.words import host_of, written

log = logging.getLogger(__name__)

#: The maximum length of the accept queue; net.core.somaxconn caps it. If a burst of clients does
#: not fit, the kernel drops connection requests, and the clients wait for seconds: they try again
#: after 1, 2, 4 ... seconds.
BACKLOG = 4096

#: A program for SO_ATTACH_FILTER (socket(7); linux/filter.h) that drops connection requests and
#: passes everything else: byte 13 of a TCP header contains the flags, SYN is 2 (RFC 9293).
_DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_SO_ATTACH_FILTER = 26
_BPF = struct.Struct("HBBI")  # struct sock_filter
_FPROG = struct.Struct("HP")  # struct sock_fprog


class ListenError(ExpectedError):
    """The daemon cannot listen on an address, or cannot use a socket that it was passed."""

    status = 71  # EX_OSERR of sysexits.h


class Listener(outlive.listener.Listener):
    """A listening socket, and its name, which determines the service: FileDescriptorName= in
    systemd.socket(5), or NAME in the setting `listen`."""

    __slots__ = ("number",)

    def __init__(self, listening: socket.socket, name: str = UPPER, number: int = 0) -> None:
        super().__init__(listening, name)
        self.number = number  # tells it apart from all others that the process has had

    def set_options(self, keepalive: float) -> None:
        """Set the options that connections inherit. Urgent data is received with the rest, as
        RFC 6093 recommends; otherwise, the kernel would count bytes that nobody receives."""
        super().set_options(keepalive)
        with contextlib.suppress(OSError):  # Multipath TCP has no urgent data
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)

    def __str__(self) -> str:
        """In the syntax of `listen`."""
        address = written(self.socket.getsockname())
        return f"{self.name}={address}" if self.name in SERVICES[1:] else address


def named(passed: Iterable[outlive.listener.Listener]) -> list[Listener]:
    """The listeners that the service manager passed.

    Warns about a name that is neither a service nor what a service manager sets by default. The
    listener is served nevertheless: its name may have been set before names had a meaning.
    """
    listeners = [Listener(one.socket, one.name) for one in passed]
    for one in listeners:
        if one.name not in SERVICES and not one.name.endswith(".socket") and one.name != "unknown":
            log.warning(
                "%s is served as %s: its name is %s, but only %s have a meaning;"
                " correct or remove FileDescriptorName= in its socket unit",
                *(one, UPPER, one.name, ", ".join(SERVICES)),
            )
    return listeners


def listen(text: str, have: Mapping[str, socket.socket]) -> list[socket.socket]:
    """Return sockets that listen on an address: one for each address of a host name, else one.

    If there are several, those that this host does not have are skipped, such as ::1 if IPv6 is
    disabled. Existing sockets, given by address in `have`, are reused.
    """
    address = parse_address(text)
    try:
        if address.path:
            return [_listen_unix(address.path)]
        if not address.host:
            return [_listen_everywhere(address.port)]
        return _listen_all(text, _resolve(address), have)
    except OSError as error:
        raise ListenError(_explain(text, address, error, have.values())) from None


def listen_on(server_address: Any, *, backlog: int, reuse: bool) -> socket.socket:
    """Return a socket that listens on an address of `socketserver`: (host, port), or a path."""
    if isinstance(server_address, (str, bytes)):
        return _listen_unix(os.fsdecode(server_address), backlog)
    host, port = server_address[:2]
    if not 0 <= port <= 65535:
        raise OverflowError(f"port {port} is out of range (0 to 65535)")  # as socket.bind does
    if not host:
        return _listen_everywhere(port, backlog, reuse)
    family, where = _resolve(Address(host, port))[0]
    return _listen_tcp(family, where, backlog, reuse)


def stop_new_connections(listening: socket.socket) -> None:
    """Accept no new handshakes; waiting connections and handshakes in progress are kept.

    Call this only if no other process holds the socket, because it cannot be undone. A TCP client
    tries again after a second, and is refused if the socket has been closed by then. If the kernel
    requires CAP_NET_ADMIN to filter a TCP socket (as 6.18 does), this does nothing.
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


class PathSocket(socket.socket):
    """A Unix socket that knows the file that was created when it was bound."""

    __slots__ = ("_file",)

    def __init__(self, path: str) -> None:
        super().__init__(socket.AF_UNIX)
        try:
            self.bind(path)
            self._file = os.lstat(path)
        except OSError:
            self.close()
            raise

    def remove_path(self) -> None:
        """Remove the file, unless the path leads to another one by now. While the socket is open,
        no other file can have the same inode."""
        path = self.getsockname()
        with contextlib.suppress(OSError):
            if os.path.samestat(self._file, os.lstat(path)):
                os.unlink(path)


def close(listening: Iterable[socket.socket]) -> None:
    """Close sockets that were bound here, and remove the paths of Unix sockets."""
    for one in listening:
        if isinstance(one, PathSocket):
            one.remove_path()
        one.close()


def _resolve(address: Address) -> list[tuple[socket.AddressFamily, Any]]:
    # As bytes, because getaddrinfo encodes even ASCII strings with IDNA, which needs imports.
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
    """Listen on all addresses that this host has; there must be at least one."""
    kept = [have[written(where)] for _, where in addresses if written(where) in have]
    addresses = [one for one in addresses if written(one[1]) not in have]
    bound: list[socket.socket] = []
    missing: OSError | None = None
    for family, where in addresses:
        try:
            bound.append(_listen_tcp(family, where))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                close(bound)
                raise
            missing = error
            log.info("%s: not listening on %s: %s", text, host_of(where), os.strerror(error.errno))
    if missing and not bound and not kept:
        raise missing
    return kept + bound


def _listen_tcp(
    family: socket.AddressFamily,
    where: Any,
    backlog: int = BACKLOG,
    reuse: bool = True,
    *,
    both: bool = False,
) -> socket.socket:
    """Return a listening TCP socket; with `reuse`, even if connections of an earlier socket
    linger; with `both`, for IPv4 in addition to IPv6."""
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        one.bind(where)
        one.listen(backlog)
    except OSError:
        one.close()
        raise
    return one


def _listen_everywhere(port: int, backlog: int = BACKLOG, reuse: bool = True) -> socket.socket:
    """Return a socket for all addresses, IPv6 and IPv4, or only IPv4 if there is no IPv6."""
    try:
        return _listen_tcp(socket.AF_INET6, ("::", port), backlog, reuse, both=True)
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
    return _listen_tcp(socket.AF_INET, ("", port), backlog, reuse)


def _listen_unix(path: str, backlog: int = BACKLOG) -> socket.socket:
    """Return a Unix socket. As with systemd, anyone with access to its directory may connect."""
    one = _bind_abstract(path) if path.startswith("\0") else _bind_path(path)
    try:
        if isinstance(one, PathSocket):
            os.chmod(path, 0o666)
        one.listen(backlog)
    except OSError:
        close([one])
        raise
    return one


def _bind_abstract(name: str) -> socket.socket:
    one = socket.socket(socket.AF_UNIX)
    try:
        one.bind(name)
    except OSError:
        one.close()
        raise
    return one


def _bind_path(path: str) -> PathSocket:
    """Bind a path, which may have been left behind by another program."""
    try:
        return PathSocket(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not _is_stale(path):
            raise
    os.unlink(path)
    return PathSocket(path)


def _is_stale(path: str) -> bool:
    """Whether a socket file was left behind by a program that has exited."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED


_REMEDIES = {
    errno.EADDRINUSE: "another program is listening there (ss -lp shows which); stop it or choose"
    " another address",
    errno.EADDRNOTAVAIL: "this host has no such address",
    errno.EINVAL: "a link-local address requires its interface, as in [fe80::1%eth0]:9999",
    errno.EACCES: "ports below 1024 require root or CAP_NET_BIND_SERVICE",
    errno.EAFNOSUPPORT: "not permitted or not supported here; inside the service's sandbox, only"
    " sockets passed by systemd can be used, so set the address in tcpupperd.socket",
}

_REMEDIES_FOR_PATHS = _REMEDIES | {
    errno.EACCES: "no permission to create a socket in this directory",
    errno.ENOENT: "the directory does not exist",
}


def _explain(text: str, address: Address, error: OSError, have: Iterable[socket.socket]) -> str:
    if isinstance(error, socket.gaierror):
        return f'cannot listen on {text}: "{address.host}" cannot be resolved: {error.strerror}'
    if error.errno == errno.EADDRINUSE and _is_other_file(address.path):
        return (
            f"cannot listen on {text}: it exists and is not a socket; use another path in listen"
        )
    if error.errno == errno.EADDRINUSE and (overlap := _overlap(address, have)):
        return (
            f"cannot listen on {text}: this daemon is already listening on {overlap}, which"
            " overlaps; leave one of them out, or restart it to change from one to the other"
        )
    # Not error.strerror: socket.create_server appends the address to it.
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedies = _REMEDIES_FOR_PATHS if address.path else _REMEDIES
    remedy = remedies.get(error.errno or 0)
    return f"cannot listen on {text}: {reason}" + (f"; {remedy}" if remedy else "")


#: A host that stands for all addresses.
_ANY = {"0.0.0.0", "::"}


def _overlap(address: Address, have: Iterable[socket.socket]) -> str:
    """The address of one of the daemon's own sockets that keeps it from listening on another; ""
    if there is none. Only a socket for all addresses overlaps with others of its port."""
    if address.path:
        return ""
    wanted = _resolve(address if address.host else address._replace(host="::"))
    for one in have:
        if one.family == socket.AF_UNIX:
            continue
        host, port = one.getsockname()[:2]
        both = not address.host or _serves_both(one)
        for family, where in wanted:
            is_same = where[1] == port and (both or family == one.family)
            if is_same and _ANY & {host, where[0]}:
                return written(one.getsockname())
    return ""


def _serves_both(one: socket.socket) -> bool:
    """Whether a socket is for IPv4 in addition to IPv6."""
    is_ipv6 = one.family == socket.AF_INET6
    return is_ipv6 and not one.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def _is_other_file(path: str) -> bool:
    """Whether there is a file with this name that is not a socket."""
    with contextlib.suppress(OSError):  # it has disappeared
        return path.startswith("/") and not stat.S_ISSOCK(os.lstat(path).st_mode)
    return False


class Listeners:
    """The listening sockets of the daemon: those that it was passed, or else its own."""

    def __init__(self, passed: list[Listener], *, bind: bool = True) -> None:
        """If none were passed, `bind` allows the daemon to bind its own."""
        self._passed = passed
        for number, listener in enumerate(passed):
            listener.number = number
        self.passed = bool(passed) or not bind
        """Whether the service manager passes the sockets, and so also holds them."""
        self._bound: dict[str, list[socket.socket]] = {}
        self._numbers: dict[tuple[str, str], int] = {}  # by service and address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop listening; sockets that were passed are only closed."""
        self.keep_only(())
        for listener in self._passed:
            listener.socket.close()

    def bind(self, addresses: Iterable[str]) -> None:
        """Listen on these addresses as well. If one raises ListenError, none is added. Does
        nothing if the sockets were passed by the service manager."""
        if self.passed:
            return
        before, addresses = self._bound, list(addresses)
        try:
            for text in addresses:
                if text not in self._bound:
                    self._bound = self._bound | {text: self._listen(text, addresses)}
            self._check_services(addresses)
        except ListenError:
            self.keep_only(before)
            raise

    def keep_only(self, addresses: Iterable[str]) -> bool:
        """Stop listening on all other addresses; return whether there were any."""
        dropped = self._keep_only(addresses)
        close(dropped)
        return bool(dropped)

    def close_others_in_worker(self, addresses: Iterable[str]) -> None:
        """For a process that shares the sockets: close those on other addresses. Another process
        is still listening on them, so no path is removed."""
        for one in self._keep_only(addresses):
            one.close()

    def __iter__(self) -> Iterator[Listener]:
        """All listeners."""
        return iter(self._passed or self._all_bound())

    def sockets(self) -> list[socket.socket]:
        """The sockets of all listeners."""
        return [listener.socket for listener in self]

    def _listen(self, text: str, wanted: Sequence[str]) -> list[socket.socket]:
        """Sockets that listen on an address: existing ones, for this service or for one that is no
        longer wanted there, or else new ones."""
        service, address = split_service(text)
        for other, sockets in self._bound.items():
            before, where = split_service(other)
            if where == address and (before == service or other not in wanted):
                return sockets
        return listen(address, {written(one.getsockname()): one for one in self.sockets()})

    def _check_services(self, addresses: Iterable[str]) -> None:
        """Raise ListenError if two services have the same socket."""
        services: dict[socket.socket, str] = {}
        for text in addresses:
            service, address = split_service(text)
            for one in self._bound[text]:
                if services.setdefault(one, service) != service:
                    raise ListenError(
                        f"cannot listen on {text}: {address} is already used by the"
                        f" {services[one]} service; give each service its own address"
                    )

    def _all_bound(self) -> list[Listener]:
        """Each socket once, although two addresses may share a socket. If it changes from one
        service to another, its listener is of the new service."""
        services = {
            one: split_service(text)[0] for text, sockets in self._bound.items() for one in sockets
        }
        return [Listener(one, name, self._number(one, name)) for one, name in services.items()]

    def _number(self, one: socket.socket, name: str) -> int:
        """The number of a listener: the same again if it returns after having been removed."""
        key = name, written(one.getsockname())
        return self._numbers.setdefault(key, len(self._numbers))

    def _keep_only(self, addresses: Iterable[str]) -> list[socket.socket]:
        """Keep only these addresses; return the sockets that have no address left."""
        before, wanted = self.sockets(), set(addresses)
        self._bound = {text: found for text, found in self._bound.items() if text in wanted}
        after = self.sockets()
        return [one for one in before if one not in after]

    def __str__(self) -> str:
        return ", ".join(map(str, self)) or "no address"
