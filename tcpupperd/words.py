"""Numbers and addresses in messages, of the daemon and the client."""

from __future__ import annotations

import os
import socket

import outlive.words

TYPE_CHECKING = False  # as in typing, which the client does not import
if TYPE_CHECKING:
    from typing import Any

counted = outlive.words.counted


def written(address: Any) -> str:
    """The address of a socket or its peer, in the syntax of `parse_address`; "local client" for a
    Unix socket without one."""
    if isinstance(address, tuple):
        host, port = host_of(address), address[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = os.fsdecode(address).replace("\0", "@", 1)
    if not path.isprintable():  # the client chose it, and must not inject lines into the log
        return repr(path)[1:-1]
    return path or "local client"


def host_of(address: Any) -> str:
    """The IP address in the address of a socket, as it is written in messages."""
    return plain_host(scoped_host(address))


def scoped_host(address: Any) -> str:
    """The IP address in the address of a socket, with the interface if it is link-local: on
    another interface, another host may have the same address."""
    host, _, *ipv6 = address
    scope = ipv6[1] if ipv6 else 0
    return f"{host}%{_interface(scope)}" if scope and "%" not in host else str(host)


def _interface(index: int) -> str:
    """The name of a network interface. If a sandbox forbids the socket with which to ask for it,
    this is the number, which the resolver accepts as well."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)


def plain_host(host: str) -> str:
    """An IP address without the IPv4-mapped prefix of addresses from dual-stack sockets."""
    ipv4 = host.removeprefix("::ffff:")
    return host if ":" in ipv4 or "." not in ipv4 else ipv4
