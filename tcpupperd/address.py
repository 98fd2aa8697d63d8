"""Addresses: where to listen, and where clients connect from."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from tcpupperd.words import scoped_host

#: The maximum length of a Unix socket's path, in bytes: sun_path in unix(7), without the NUL.
PATH_MAX = 107

#: The first bytes of an IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2).
MAPPED_PREFIX = bytes(10) + b"\xff\xff"

#: Text that looks like an IPv4 address: the resolver would read 10.1 as 10.0.0.1.
_IPV4_LIKE = re.compile(r"[0-9.]+")

#: The names of the services. A listener that has none of these names provides the first one.
SERVICES = UPPER, PROXY, AGENT, METRICS, LAB, LAB_PROXY = (
    "upper",
    "proxy",
    "agent",
    "metrics",
    "lab",
    "lab-proxy",
)

_FORMS = "must be host:port, [::1]:port, port, /path or @abstract"


class Address(NamedTuple):
    """Where to listen: a host ("" means any) and port, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""  # begins with a NUL if it is abstract


def parse_address(text: str) -> Address:
    """Parse an address in the syntax of ListenStream= in systemd.socket(5). Raises ValueError."""
    if text.startswith(("/", "@")):
        if len(os.fsencode(text)) > PATH_MAX or "\0" in text or len(text) == 1:
            raise ValueError(
                f'"{text}": a socket path must be 1 to {PATH_MAX} bytes long and contain no NUL'
            )
        return Address(path="\0" + text[1:] if text.startswith("@") else text)
    found = re.fullmatch(r"(?:(?:\[([^][]+)\]|([^][:@/\s]+)):)?([0-9]{1,5})", text, re.ASCII)
    if not found or int(found[3]) > 65535:
        raise ValueError(f'"{text}": {_FORMS} (0 to 65535)')
    ipv6, host = found[1], found[2] or ""
    if ipv6 and not _is_ip(socket.AF_INET6, re.sub(r"%[^%/\s\0]+$", "", ipv6)):
        raise ValueError(f'"{text}": "{ipv6}" is not an IPv6 address')
    if _IPV4_LIKE.fullmatch(host) and not _is_ip(socket.AF_INET, host):
        raise ValueError(f'"{text}": "{host}" is not an IPv4 address')
    if not _is_host_name(host):
        raise ValueError(f'"{text}": "{host}" is not a host name')
    return Address(host=ipv6 or host, port=int(found[3]))


def split_service(text: str) -> tuple[str, str]:
    """Split an entry of `listen`, NAME=ADDRESS or ADDRESS, into the service and the address.
    Raises ValueError if the service is unknown."""
    name, mark, address = text.partition("=")
    if not mark or text.startswith(("/", "@")):  # a path may contain "="
        return UPPER, text
    if name not in SERVICES:
        known = ", ".join(SERVICES)
        raise ValueError(f'"{text}": unknown service "{name}"; the services are {known}')
    return name, address


def _is_ip(family: socket.AddressFamily, text: str) -> bool:
    try:
        socket.inet_pton(family, text)
    except (OSError, ValueError):  # ValueError if it is not ASCII
        return False
    return True


def _is_host_name(text: str) -> bool:
    """Whether the resolver accepts a name: non-ASCII letters need IDNA, and a NUL is invalid."""
    try:
        return "\0" not in text and (text.isascii() or bool(text.encode("idna")))
    except UnicodeError:
        return False


def connectable(address: Any) -> Any:
    """The address of a socket in the form that `socket.create_connection` accepts: a host and a
    port, without the additional fields of IPv6. The path of a Unix socket is unchanged."""
    return (scoped_host(address), address[1]) if isinstance(address, tuple) else address


class Networks:
    """A set of networks, in which to look up the addresses of clients."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._networks = [parse_network(text) for text in texts]
        self._has = lru_cache(self._look_up)  # the same few addresses connect repeatedly

    def __contains__(self, client_address: Any) -> bool:
        """Whether a client's address is in one of the networks. Local clients always pass: the
        permissions of a Unix socket decide who can connect to it."""
        return not isinstance(client_address, tuple) or self._has(client_address[0])

    def _look_up(self, host: str) -> bool:
        packed = pack(host.partition("%")[0])
        return any(
            len(network) == len(packed) and _first_bits(packed, prefix) == network
            for network, prefix in self._networks
        )


def parse_network(text: str) -> tuple[bytes, int]:
    """Parse an IP address, or a network such as 192.0.2.0/24; return the first address in binary
    form and the prefix length. Raises ValueError."""
    host, slash, size = text.partition("/")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if not _is_ip(family, host):
        raise ValueError(f'"{text}": must be an IP address or a network such as 192.0.2.0/24')
    packed = socket.inet_pton(family, host)
    if family == socket.AF_INET6 and packed.startswith(MAPPED_PREFIX):
        raise ValueError(f'"{text}": is an IPv4-mapped IPv6 address; write it as an IPv4 address')
    bits = len(packed) * 8
    if slash and not (re.fullmatch(r"0|[1-9][0-9]{0,2}", size, re.ASCII) and int(size) <= bits):
        raise ValueError(f'"{text}": the prefix length must be a number from 0 to {bits}')
    prefix = int(size) if slash else bits
    first = _first_bits(packed, prefix)
    if first != packed:
        network = f"{socket.inet_ntop(family, first)}/{prefix}"
        raise ValueError(f'"{text}": has host bits set; write "{network}"')
    return packed, prefix


def _first_bits(packed: bytes, count: int) -> bytes:
    """An address with all bits after the first `count` cleared."""
    rest = len(packed) * 8 - count
    return (int.from_bytes(packed, "big") >> rest << rest).to_bytes(len(packed), "big")


def pack(host: str) -> bytes:
    """An IP address in binary form: 4 bytes, even if it is IPv4-mapped, or 16."""
    if ":" not in host:
        return socket.inet_pton(socket.AF_INET, host)
    packed = socket.inet_pton(socket.AF_INET6, host)
    return packed.removeprefix(MAPPED_PREFIX)


def source_of(client_address: Any) -> str:
    """The source by which `max_connections_per_source` counts: an IPv4 address, or the first 64
    bits of an IPv6 address, because providers assign at least a /64 to each customer; "" for a
    local client, which is never limited."""
    if not isinstance(client_address, tuple):
        return ""
    host, scope, interface = scoped_host(client_address).partition("%")
    if ":" not in host:
        return host
    packed = pack(host)
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    return packed[:8].hex() + scope + interface
