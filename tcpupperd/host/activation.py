"""Sockets that a service manager passes in: sd_listen_fds(3)."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import MutableMapping
from typing import NamedTuple

from tcpupperd.host.sockets import Listener, ListenError

#: The first descriptor that is passed in: SD_LISTEN_FDS_START of sd_listen_fds(3).
LISTEN_FDS_START = 3


class Passed(NamedTuple):
    """The sockets that a service manager passed in."""

    listening: list[Listener]
    connected: list[socket.socket]  # from a socket unit with Accept=yes
    stored: dict[str, socket.socket]  # what an earlier run gave to the service manager, by name


def passed_in(environ: MutableMapping[str, str]) -> Passed:
    """The sockets passed in by the rules of sd_listen_fds(3), which are: for this process only,
    descriptors from 3 on, names by position. The variables are removed from `environ`.

    Raises ListenError if they are malformed, or a descriptor is not what this daemon can use.
    """
    variables = {
        name: environ.pop(name)
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
        if name in environ
    }
    passed = Passed([], [], {})
    if not _meant_for_us(variables):
        return passed
    count = _number(variables, "LISTEN_FDS")
    names = variables["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in variables else []
    if names and len(names) != count:
        raise ListenError(f"LISTEN_FDNAMES has {len(names)} names for LISTEN_FDS={count} sockets")
    for index in range(count):
        _sort_in(LISTEN_FDS_START + index, names[index] if names else "unknown", passed)
    return passed


def _meant_for_us(variables: dict[str, str]) -> bool:
    if "LISTEN_PID" not in variables or _number(variables, "LISTEN_PID") != os.getpid():
        return False
    identity = variables.get("LISTEN_PIDFDID")
    # A process id can be used again, the inode of a pidfd (systemd 259, Linux 6.9) cannot.
    return identity is None or _pidfd_inode() in (None, _number(variables, "LISTEN_PIDFDID"))


def _pidfd_inode() -> int | None:
    """The inode of our own pidfd, or None where the kernel has no pidfs that gives it one."""
    try:
        pidfd, eventfd = os.pidfd_open(os.getpid()), os.eventfd(0)
    except OSError:
        return None
    try:
        ours, anonymous = os.fstat(pidfd), os.fstat(eventfd)
    finally:
        os.close(pidfd)
        os.close(eventfd)
    # Without pidfs it is an anonymous inode, one and the same for all. (Its name tells nothing:
    # with pidfs too it is "anon_inode:[pidfd]".)
    return ours.st_ino if ours.st_dev != anonymous.st_dev else None


def _number(variables: dict[str, str], name: str) -> int:
    text = variables.get(name, "")
    if re.fullmatch(r"[0-9]{1,19}", text, re.ASCII) and int(text) > 0:
        return int(text)
    raise ListenError(f'{name}="{text}" is not a number above 0; a service manager sets it')


def _sort_in(fd: int, name: str, passed: Passed) -> None:
    what = f'descriptor {fd} ("{name}"), which was passed in,'
    try:
        os.set_inheritable(fd, False)
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ListenError(f"{what} is not a socket; use ListenStream=")
        one = socket.socket(fileno=fd)
    except OSError as error:
        raise ListenError(f"{what} cannot be used: {error.strerror}") from None
    if one.type == socket.SOCK_SEQPACKET:
        passed.stored[name] = one
    elif one.type != socket.SOCK_STREAM:
        raise ListenError(f"{what} is a {one.type.name} socket; use ListenStream=")
    elif one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        passed.listening.append(Listener(one, name))
    elif name == "connection" or _is_connected(one):  # or it was, and its client is gone
        passed.connected.append(one)
    else:
        raise ListenError(f"{what} neither listens nor is connected; use ListenStream=")


def _is_connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:
        return False
    return True
