"""Descriptors that a service manager passes to a service: sd_listen_fds(3)."""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
from collections.abc import Container, Mapping, MutableMapping
from typing import NamedTuple

from outlive.listener import Listener

log = logging.getLogger(__name__)

#: The first descriptor that is passed: SD_LISTEN_FDS_START in sd_listen_fds(3).
LISTEN_FDS_START = 3

#: The families of addresses that can be served.
FAMILIES = {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}

#: Sockets that cannot be served, and the directives of systemd.socket(5) that make them.
_OTHER_FAMILIES: dict[int, tuple[str, str]] = {
    socket.AF_VSOCK: ("a vsock socket", "ListenStream=vsock:"),
    socket.AF_NETLINK: ("a netlink socket", "ListenNetlink="),
}
_OTHER_TYPES: dict[int, tuple[str, str]] = {
    socket.SOCK_DGRAM: ("a datagram socket", "ListenDatagram="),
    socket.SOCK_SEQPACKET: ("a SOCK_SEQPACKET socket", "ListenSequentialPacket="),
}
_UNKNOWN_SOCKET = "a socket of another kind", "the directive for it"


class PassedError(Exception):
    """A descriptor that was passed cannot be used, or the variables about them are malformed."""


class PassedDescriptors(NamedTuple):
    """The descriptors passed by the service manager."""

    listening: list[Listener]
    connected: list[socket.socket]  # from a socket unit with Accept=yes
    stored: list[tuple[str, int]]  # stored by an earlier run: names and descriptors


def keeps_descriptors(environ: Mapping[str, str]) -> bool:
    """Whether the service manager claims to keep descriptors from one run to the next."""
    return "NOTIFY_SOCKET" in environ and environ.get("FDSTORE", "0") not in ("", "0")


def passed_descriptors(
    environ: MutableMapping[str, str],
    stores: Container[str] = (),
    *,
    names: Container[str] = (),
    required: bool = False,
) -> PassedDescriptors:
    """The passed descriptors, by the rules of sd_listen_fds(3): only for this process, starting at
    descriptor 3, with names by position. The variables are removed from `environ`.

    A descriptor counts as stored by an earlier run if its name is in `stores`. If the service
    manager keeps descriptors, anything that no socket unit could have passed also counts as
    stored, because another version may have stored it; `names` are those that socket units may
    use, besides their own.

    What cannot be served is logged and closed. Raises PassedError if nothing is left, if the
    variables are malformed, or if sockets are `required` and are for another process.
    """
    kept = keeps_descriptors(environ)
    variables = {
        name: environ.pop(name)
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
        if name in environ
    }
    passed = PassedDescriptors([], [], [])
    if not _is_for_this_process(variables):
        _tell_of_another_process(variables, required=required)
        return passed
    count = _number(variables, "LISTEN_FDS")
    given = variables["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in variables else []
    if given and len(given) != count:
        raise PassedError(f"LISTEN_FDNAMES has {len(given)} names for LISTEN_FDS={count} sockets")
    problems = []
    for index in range(count):
        fd, name = LISTEN_FDS_START + index, given[index] if given else "unknown"
        of_unit = name in names or name.endswith(".socket")
        try:
            found = _classify(fd, name, stored=name in stores, kept=kept, of_unit=of_unit)
        except PassedError as error:
            problems.append(str(error))
            continue
        if isinstance(found, Listener):
            passed.listening.append(found)
        elif isinstance(found, socket.socket):
            passed.connected.append(found)
        else:
            passed.stored.append((name, found))
    if problems and not any(passed):
        raise PassedError("\n".join(problems))
    for problem in problems:
        log.error("%s", problem)
    return passed


def _tell_of_another_process(variables: dict[str, str], *, required: bool) -> None:
    """Sockets for another process are not in themselves an error: variables are inherited."""
    if "LISTEN_PID" not in variables:
        return
    text = (
        "the sockets passed by the service manager are for process"
        f" {variables['LISTEN_PID']} (LISTEN_PID), but this is process {os.getpid()};"
        " a wrapper has to exec the program, and the unit must"
        " not set PrivatePIDs="
    )
    if required:
        raise PassedError(text)
    log.warning("%s", text)


def _is_for_this_process(variables: dict[str, str]) -> bool:
    if "LISTEN_PID" not in variables or _number(variables, "LISTEN_PID") != os.getpid():
        return False
    identity = variables.get("LISTEN_PIDFDID")
    # A process ID can be reused; the inode of a pidfd (systemd 259, Linux 6.9) cannot.
    return identity is None or _pidfd_inode() in (None, _number(variables, "LISTEN_PIDFDID"))


def _pidfd_inode() -> int | None:
    """The inode of this process's pidfd, or None if the kernel has no pidfs."""
    try:
        pidfd, eventfd = os.pidfd_open(os.getpid()), os.eventfd(0)
    except OSError:
        return None
    try:
        ours, anonymous = os.fstat(pidfd), os.fstat(eventfd)
    finally:
        os.close(pidfd)
        os.close(eventfd)
    # Without pidfs, all pidfds share the anonymous inode. (The name does not help: it is
    # "anon_inode:[pidfd]" even with pidfs.)
    return ours.st_ino if ours.st_dev != anonymous.st_dev else None


def _number(variables: dict[str, str], name: str) -> int:
    text = variables.get(name, "")
    if re.fullmatch(r"[0-9]{1,19}", text, re.ASCII) and int(text) > 0:
        return int(text)
    raise PassedError(
        f'{name}="{text}" is not a positive number; the service manager sets this variable'
    )


def _classify(
    fd: int, name: str, *, stored: bool, kept: bool, of_unit: bool
) -> Listener | socket.socket | int:
    """A descriptor as what it is: a listener, a connection, or else one that was stored. Only a
    socket unit can have passed one `of_unit`."""
    what = f'descriptor {fd} ("{name}"), which was passed by the service manager,'
    try:
        os.set_inheritable(fd, False)
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        one = socket.socket(fileno=fd) if is_socket and not stored else None
    except OSError as error:
        raise PassedError(f"{what} cannot be used: {error.strerror}") from None
    if one and can_listen(one):
        return Listener(one, name)
    if one and _is_connection(one, name, named=kept):
        return one
    if stored or (kept and not of_unit):
        return one.detach() if one else fd
    problem = _problem(one, fd)
    os.close(one.detach() if one else fd)
    raise PassedError(f"{what} {problem}")


def can_listen(one: socket.socket) -> bool:
    """Whether it is a listening socket that can be served."""
    accepts = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return one.type == socket.SOCK_STREAM and one.family in FAMILIES and bool(accepts)


def _is_connection(one: socket.socket, name: str, *, named: bool) -> bool:
    """Whether it is a connection from a socket unit with Accept=yes, even if its client has
    already disconnected. With `named`, it must have the name that systemd gives to connections."""
    if one.type != socket.SOCK_STREAM or name == "connection" or named:
        return one.type == socket.SOCK_STREAM and name == "connection"
    try:
        one.getpeername()
    except OSError:
        return False
    return one.family in FAMILIES


def _problem(one: socket.socket | None, fd: int) -> str:
    """Why a descriptor cannot be served, and what to change in its socket unit."""
    if one and one.family in FAMILIES and one.type == socket.SOCK_STREAM:
        return "is neither listening nor connected; use ListenStream="
    kind, directive = _kind(one, fd)
    remedy = f"replace {directive} with ListenStream= and an address for TCP or a Unix socket"
    return f"is {kind} and is not served; in its socket unit, {remedy}"


def _kind(one: socket.socket | None, fd: int) -> tuple[str, str]:
    """What a descriptor is, and the directive of systemd.socket(5) that makes it."""
    if one:
        by_type = _OTHER_TYPES.get(one.type, _UNKNOWN_SOCKET)
        return _OTHER_FAMILIES.get(one.family, by_type)
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        return "a FIFO", "ListenFIFO="
    return "not a socket", "ListenSpecial= or ListenMessageQueue="
