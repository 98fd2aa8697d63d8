"""The PROXY protocol, versions 1 and 2, sans I/O.

A load balancer sends a header ahead of a client's data to pass on the client's address. The
specification is HAProxy's doc/proxy-protocol.txt; the quotations below are from there. A receiver
must not guess: anything other than a valid header is rejected, with a reason that helps the
administrator of the balancer.

Existing libraries accept malformed headers, among them ports such as "+80", which Python's `int`
accepts. Here, a number is ASCII digits, and an address is what inet_pton(3) accepts.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from tcpupperd.serving.counters import (
    PROXY_ABSENT,
    PROXY_CHECKSUM,
    PROXY_INCOMPLETE,
    PROXY_INVALID,
)
from tcpupperd.serving.protocol import Protocol
from tcpupperd.words import counted

#: The beginning of a header of version 1, which is a line of text.
KEYWORD = b"PROXY "

#: "If the CRLF sequence is not found in the first 107 characters, the receiver should declare the
#: line invalid."
LINE_MAX = 107

#: The maximum size of a header in bytes: 4096, as in nginx. The format allows 65,551, but a
#: header of that size with a checksum would keep all other clients waiting for 7 ms, and known
#: senders need a few hundred.
HEADER_MAX = 4096

_FAMILIES = {"TCP4": socket.AF_INET, "TCP6": socket.AF_INET6}
_LINE_END = re.compile(rb"[\r\n]")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")

#: The beginning of a header of version 2.
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"

#: The signature; version, command, address family and transport protocol, four bits each; the
#: length of the rest.
_HEAD = struct.Struct("!12sHH")
_LOCAL, _PROXY = 0, 1  # commands
_FAMILY_MAX, _TRANSPORT_MAX = 3, 2  # AF_UNIX, DGRAM
_STREAM = 1

#: The extensions after the addresses (TLVs: type, length, value), and the types that matter here.
_TLV = struct.Struct("!BH")
_CRC32C = 3
SSL = 0x20


class Header(NamedTuple):
    """A complete header."""

    size: int  # in bytes
    source: tuple[str, int] | str | None
    """The client's host and port, or "" if it uses a Unix socket; None if the header names no
    client, in which case the peer of the connection is the client."""

    destination: tuple[str, int] | None = None  # where the client has connected to
    extensions: tuple[tuple[int, bytes], ...] = ()  # type and value of each


class HeaderError(Exception):
    """There is no valid header: `counter` is the kind of reason, the message the exact reason."""

    def __init__(self, counter: int, message: str) -> None:
        super().__init__(message)
        self.counter = counter


#: Returns the protocol for a client, or None to refuse it. Called with the connection, and with
#: the header, the error that says why there is none, or None if nothing was received.
Successor = Callable[[Any, "Header | HeaderError | None"], Protocol | None]


class HeaderProtocol(Protocol):
    """Receives the header, to which line_timeout applies, and answers nothing. It is finished when
    `found` identifies the client or says why the header is rejected."""

    __slots__ = ("_data", "_successor", "found", "service")

    identifies_client = True
    receive_size = HEADER_MAX

    def __init__(self, successor: Successor, service: str = "proxy") -> None:
        super().__init__()
        self.service = service
        self._successor = successor
        self._data = b""
        self.found: Header | HeaderError | None = None

    def receive(self, data: bytes) -> bytes:
        """Receive more of the header; there is nothing to answer."""
        self._data += data
        try:
            self.found = parse(self._data)
        except HeaderError as error:
            self.found = error
        self.mid_line = self.found is None
        self.finished = not self.mid_line
        self.held = self._data if self.mid_line else b""
        return b""

    def finish(self) -> None:
        """Receive nothing more. A client that has sent nothing is not an error: it may be a health
        check."""
        if self.mid_line:
            size = counted(len(self._data), "byte")
            self.found = HeaderError(PROXY_INCOMPLETE, f"the header was incomplete after {size}")
        self.mid_line = False
        self.held = b""
        self.finished = True

    def successor(self, connection: Any) -> tuple[Protocol, bytes] | None:
        """The protocol for the client, and the data received after the header; None if the client
        is refused."""
        protocol = self._successor(connection, self.found)
        return (protocol, self.rest) if protocol else None

    @property
    def problem(self) -> str:
        """Why the header is rejected."""
        return str(self.found) if isinstance(self.found, HeaderError) else ""

    @property
    def rest(self) -> bytes:
        """The data received after the header."""
        found = self.found
        return self._data[found.size :] if isinstance(found, Header) else b""

    def resume(self, lines: int, mid_line: bool, held: bytes) -> bytes:
        """Continue where another process stopped; there is nothing to answer. If that process was
        killed, the header may be complete."""
        if held:
            self.receive(held)
        self.mid_line = mid_line and not self.finished
        return b""


def parse(data: bytes | bytearray) -> Header | None:
    """The header at the beginning of `data`, or None if it is not complete yet.

    Raises HeaderError once `data` cannot become a header. The result does not depend on how the
    bytes are split into chunks.
    """
    if data.startswith(SIGNATURE):
        return _parse_binary(data)
    if data.startswith(KEYWORD):
        return _parse_line(data)
    if SIGNATURE.startswith(data) or KEYWORD.startswith(data):
        return None
    at = max(_common(data, SIGNATURE), _common(data, KEYWORD))
    raise HeaderError(PROXY_ABSENT, f"not a PROXY header: byte {at + 1} is {data[at]:#04x}")


def _common(data: bytes | bytearray, start: bytes) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(data, start, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(data), len(start)))


def _invalid(message: str) -> HeaderError:
    return HeaderError(PROXY_INVALID, message)


# Version 1


def _parse_line(data: bytes | bytearray) -> Header | None:
    found = _LINE_END.search(data, 0, LINE_MAX - 1)
    if not found:
        if len(data) >= LINE_MAX - 1:
            raise _invalid(f"there is no CRLF in the first {LINE_MAX} bytes")
        return None
    end, size = found.start(), found.end() + 1
    if found[0] == b"\n":
        raise _invalid(f"byte {size - 1} is an LF without a CR")
    if len(data) < size:
        return None
    if data[size - 1] != ord("\n"):
        raise _invalid(f"byte {size - 1} is a CR without an LF")
    return Header(size, *_ends_in(data[:end].decode("ascii", "backslashreplace").split(" ")))


#: The source and the destination.
_Ends = tuple[tuple[str, int] | None, tuple[str, int] | None]


def _ends_in(fields: list[str]) -> _Ends:
    """The ends in the fields of a line: keyword, family, two addresses, two ports."""
    family = fields[1]
    if family == "UNKNOWN":  # "the receiver must ignore anything presented before the CRLF"
        return None, None
    if family not in _FAMILIES:
        raise _invalid(f"{family!r} is not TCP4, TCP6 or UNKNOWN")
    if len(fields) != 6:
        raise _invalid(f"expected 6 fields separated by single spaces, found {len(fields)}")
    _, _, source, destination, source_port, destination_port = fields
    hosts = _host(family, source), _host(family, destination)
    ports = _port(source_port), _port(destination_port)
    return (hosts[0], ports[0]), (hosts[1], ports[1])


def _host(family: str, text: str) -> str:
    """An address in the form in which the kernel's addresses are written."""
    number = _FAMILIES[family]
    try:
        return socket.inet_ntop(number, socket.inet_pton(number, text))
    except (OSError, ValueError):  # ValueError: a NUL
        raise _invalid(f"{text!r} is not a valid {family} address") from None


def _port(text: str) -> int:
    if _PORT.fullmatch(text) and int(text) <= 65535:
        return int(text)
    raise _invalid(f"{text!r} is not a valid port (0 to 65535, no leading zeros)")


# Version 2


class _Layout(NamedTuple):
    """The layout of two addresses, with their ports if they have any."""

    family: int
    addresses: struct.Struct


#: The layouts in version 2, by address family. They are the same for all transport protocols.
_LAYOUTS = {
    1: _Layout(socket.AF_INET, struct.Struct("!4s4sHH")),
    2: _Layout(socket.AF_INET6, struct.Struct("!16s16sHH")),
    3: _Layout(socket.AF_UNIX, struct.Struct("!108s108s")),
}


def _parse_binary(data: bytes | bytearray) -> Header | None:
    if len(data) < _HEAD.size:
        return None
    _, kind, length = _HEAD.unpack_from(data)
    is_introduction, layout, is_stream = _kind(kind)
    size = _HEAD.size + length
    if size > HEADER_MAX:
        raise _invalid(f"the header takes {size} bytes, but at most {HEADER_MAX} are allowed")
    if layout and length < layout.addresses.size:
        needed = layout.addresses.size
        raise _invalid(f"the length is {length}, but the addresses take {needed} bytes")
    if len(data) < size:
        return None
    if not is_introduction:  # "must [...] discard the protocol block including the family"
        return Header(size, None)
    return _introduction(bytes(data[:size]), layout, is_stream=is_stream)


def _introduction(header: bytes, layout: _Layout | None, *, is_stream: bool) -> Header:
    """A complete header that introduces a client."""
    size = len(header)
    if not layout:
        _check_unspecified(header)
        return Header(size, None)
    family, addresses = layout
    extensions = _checked_extensions(header, _HEAD.size + addresses.size)
    if not is_stream:  # "the receiver should ignore address information"
        return Header(size, None)
    if family == socket.AF_UNIX:
        return Header(size, "", None, extensions)
    source, destination, *ports = addresses.unpack_from(header, _HEAD.size)
    hosts = socket.inet_ntop(family, source), socket.inet_ntop(family, destination)
    return Header(size, (hosts[0], ports[0]), (hosts[1], ports[1]), extensions)


def _kind(kind: int) -> tuple[bool, _Layout | None, bool]:
    """Whether a header introduces a client, the layout of the addresses, and whether they are
    those of a stream; raises HeaderError if there is no such kind of header."""
    version, command, family, transport = (kind >> shift & 15 for shift in (12, 8, 4, 0))
    if version != 2:
        raise _invalid(f"the version is {version}, not 2")
    if command == _LOCAL:
        return False, None, False
    if command != _PROXY:
        raise _invalid(f"the command is {command}, not 0 (LOCAL) or 1 (PROXY)")
    if family > _FAMILY_MAX:
        raise _invalid(f"unknown address family {family} (the highest is {_FAMILY_MAX}, AF_UNIX)")
    if transport > _TRANSPORT_MAX:
        highest = f"{_TRANSPORT_MAX}, DGRAM"
        raise _invalid(f"unknown transport protocol {transport} (the highest is {highest})")
    return True, _LAYOUTS.get(family), transport == _STREAM


def _check_unspecified(header: bytes) -> None:
    """Verify the checksum in a header without a family. Addresses of unknown length may precede
    the extensions; then there is nothing that could be verified."""
    try:
        _checked_extensions(header, _HEAD.size)
    except HeaderError as error:
        if error.counter == PROXY_CHECKSUM:
            raise


def _checked_extensions(header: bytes, start: int) -> tuple[tuple[int, bytes], ...]:
    """The extensions, which must end exactly where the header ends. Any checksum among them is
    verified."""
    found, checksum = [], None
    for at, kind, value in _extensions(header, start):
        if kind == _CRC32C:
            if checksum or len(value) != 4:
                raise _invalid("the checksum must be a single TLV of 4 bytes")
            checksum = slice(at, at + 4)
        found.append((kind, value))
    if checksum:
        _verify(header, checksum)
    return tuple(found)


def in_extensions(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """The type and the value of each TLV up to the first one that is truncated."""
    with contextlib.suppress(HeaderError):
        for _, kind, value in _extensions(data, start):
            yield kind, value


def _extensions(header: bytes, start: int) -> Iterator[tuple[int, int, bytes]]:
    """Each TLV: where its value begins, its type and its value."""
    at = start
    while at < len(header):
        value = at + _TLV.size
        if value > len(header):
            raise _invalid(f"the header ends inside the TLV that starts at byte {at + 1}")
        kind, length = _TLV.unpack_from(header, at)
        at = value + length
        if at > len(header):
            excess = counted(at - len(header), "byte")
            raise _invalid(f"the TLV of type {kind:#04x} extends {excess} beyond the header")
        yield value, kind, header[value:at]


def _verify(header: bytes, checksum: slice) -> None:
    found = int.from_bytes(header[checksum], "big")
    right = crc32c(header[: checksum.start] + bytes(4) + header[checksum.stop :])
    if found != right:
        message = f"the CRC32c is {found:#010x}, but should be {right:#010x}"
        raise HeaderError(PROXY_CHECKSUM, message)


def crc32c(data: bytes) -> int:
    """The checksum of RFC 4960, appendix B, which Python's standard library lacks."""
    table, rest = _crc_table(), 0xFFFFFFFF
    for byte in data:
        rest = table[(rest ^ byte) & 0xFF] ^ rest >> 8
    return rest ^ 0xFFFFFFFF


@cache
def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [rest >> 1 ^ 0x82F63B78 * (rest & 1) for rest in table]
    return table
