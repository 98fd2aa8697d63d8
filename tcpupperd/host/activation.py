"""Descriptors that a service manager passes to the daemon: sd_listen_fds(3)."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Container, Mapping, MutableMapping
from typing import NamedTuple

from tcpupperd.host.sockets import Listener, ListenError

#: The first descriptor that is passed: SD_LISTEN_FDS_START in sd_listen_fds(3).
LISTEN_FDS_START = 3


class Passed(NamedTuple):
    """The descriptors passed by the service manager."""

    listening: list[Listener]
    connected: list[socket.socket]  # from a socket unit with Accept=yes
    stored: list[tuple[str, int]]  # stored by an earlier run: names and descriptors


def keeps_descriptors(environ: Mapping[str, str]) -> bool:
    """Whether the service manager claims to keep descriptors from one run to the next."""
    return "NOTIFY_SOCKET" in environ and environ.get("FDSTORE", "0") not in ("", "0")


def passed_in(environ: MutableMapping[str, str], stores: Container[str] = ()) -> Passed:
    """The passed descriptors, by the rules of sd_listen_fds(3): only for this process, starting at
    descriptor 3, with names by position. The variables are removed from `environ`.

    A descriptor counts as stored by an earlier run if its name is in `stores`. If the service
    manager keeps descriptors, anything that no socket unit could have passed also counts as
    stored, because another version may have stored it.

    Raises ListenError if the variables are malformed, or if the daemon cannot use a descriptor.
    """
    kept = keeps_descriptors(environ)
    variables = {
        name: environ.pop(name)
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
        if name in environ
    }
    passed = Passed([], [], [])
    if not _meant_for_us(variables):
        return passed
    count = _number(variables, "LISTEN_FDS")
    names = variables["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in variables else []
    if names and len(names) != count:
        raise ListenError(f"LISTEN_FDNAMES has {len(names)} names for LISTEN_FDS={count} sockets")
    for index in range(count):
        fd, name = LISTEN_FDS_START + index, names[index] if names else "unknown"
        _sort_in(fd, name, passed, stored=name in stores, kept=kept)
    return passed


def _meant_for_us(variables: dict[str, str]) -> bool:
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
    raise ListenError(
        f'{name}="{text}" is not a positive number; the service manager sets this variable'
    )


def _sort_in(fd: int, name: str, passed: Passed, *, stored: bool, kept: bool) -> None:
    what = f'descriptor {fd} ("{name}"), which was passed by the service manager,'
    try:
        os.set_inheritable(fd, False)
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        one = socket.socket(fileno=fd) if is_socket and not stored else None
    except OSError as error:
        raise ListenError(f"{what} cannot be used: {error.strerror}") from None
    if one and _listens(one):
        passed.listening.append(Listener(one, name))
    elif one and _is_connection(one, name, named=kept):
        passed.connected.append(one)
    elif stored or kept:
        passed.stored.append((name, one.detach() if one else fd))
    else:
        raise ListenError(f"{what} {_objection(one)}; use ListenStream=")


def _listens(one: socket.socket) -> bool:
    accepts = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return one.type == socket.SOCK_STREAM and bool(accepts)


def _is_connection(one: socket.socket, name: str, *, named: bool) -> bool:
    """Whether it is a connection from a socket unit with Accept=yes, even if its client has
    already disconnected. With `named`, it must have the name that systemd gives to connections."""
    if one.type != socket.SOCK_STREAM or name == "connection" or named:
        return one.type == socket.SOCK_STREAM and name == "connection"
    try:
        one.getpeername()
    except OSError:
        return False
    return True


def _objection(one: socket.socket | None) -> str:
    if not one:
        return "is not a socket"
    if one.type != socket.SOCK_STREAM:
        return f"is a {one.type.name} socket"
    return "is neither listening nor connected"
