"""What a PROXY header says about a client, besides its address: who introduced it, and the TLVs
that administrators look for, as short texts by name.

The names are those of placeholders in a greeting and, in capitals, of fields in the journal. The
contents come from a load balancer, and some of them from its clients.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from tcpupperd.serving.proxy import SSL, Header, in_extensions
from tcpupperd.settings import INTRODUCED
from tcpupperd.words import host_of, written

#: The names and texts.
Introduction = Mapping[str, str]

#: That of a client that nobody has introduced.
NOBODY: Introduction = {}

#: The length up to which a text is kept, in characters.
TEXT_MAX = 128

#: TLVs that contain text, by type: those of the specification, and those inside the TLV `SSL`.
_TEXTS = {1: "alpn", 2: "authority", 5: "unique_id"}
_SSL_TEXTS = {0x21: "tls_version", 0x22: "tls_cn", 0x23: "tls_cipher"}

#: What precedes the TLVs inside the TLV `SSL`: flags, and 0 if a certificate has been verified.
_SSL_HEAD = struct.Struct("!BI")

#: TLVs of cloud providers, which are in the range for custom types.
_AWS, _GCP, _AZURE = 0xEA, 0xE0, 0xEE


def introduction(header: Header, balancer: object) -> Introduction:
    """The introduction of a client by a load balancer."""
    found: dict[str, str] = {}
    if isinstance(balancer, tuple):
        found = {"balancer": host_of(balancer), "balancer_port": str(balancer[1])}
    if header.destination:
        found["destination"] = written(header.destination)
    for name, value in _texts(header):
        found.setdefault(name, printable(value))
    return {name: text for name, text in found.items() if name in INTRODUCED}


def printable(value: bytes) -> str:
    """A text of at most `TEXT_MAX` characters, without any that a terminal might act on."""
    text = value[:TEXT_MAX].decode(errors="backslashreplace")
    escaped = (one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return "".join(escaped)[:TEXT_MAX]


def _texts(header: Header) -> Iterator[tuple[str, bytes]]:
    """The TLVs with a name."""
    for kind, value in header.extensions:
        if kind in _TEXTS:
            yield _TEXTS[kind], value
        elif kind == SSL:
            yield from _tls(value)
        elif kind == _AWS and value[:1] == b"\1":
            yield "aws_vpce_id", value[1:]
        elif kind == _GCP and len(value) == 8:
            yield "gcp_psc_connection_id", b"%d" % int.from_bytes(value, "big")
        elif kind == _AZURE and value[:1] == b"\1" and len(value) == 5:
            yield "azure_link_id", b"%d" % int.from_bytes(value[1:], "little")


def _tls(value: bytes) -> Iterator[tuple[str, bytes]]:
    """The TLVs about TLS. The name in a certificate that was not verified proves nothing."""
    if len(value) < _SSL_HEAD.size:
        return
    _, unverified = _SSL_HEAD.unpack_from(value)
    for kind, text in in_extensions(value, _SSL_HEAD.size):
        name = _SSL_TEXTS.get(kind)
        if name and not (unverified and name == "tls_cn"):
            yield name, text
