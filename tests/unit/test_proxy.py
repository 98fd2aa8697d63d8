"""PROXY headers: which are valid, which are not, and why."""

import random
import socket
from collections.abc import Callable
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.measures import scaled
from proxy_headers import (
    ALPN,
    AUTHORITY,
    CLIENT,
    CLIENT_6,
    CRC32C,
    LOCAL,
    NETNS,
    NOOP,
    SERVER_6,
    SIGNATURE,
    SSL,
    TCP4,
    TCP6,
    UDP4,
    UDP6,
    UNIQUE_ID,
    UNIX_DATAGRAM,
    UNIX_STREAM,
    UNSPEC,
    Endpoint,
    addresses,
    binary,
    line,
    tlv,
)
from tcpupperd.serving.counters import WORKER
from tcpupperd.serving.proxy import HEADER_MAX, Header, HeaderError, HeaderProtocol, crc32c, parse

V6 = addresses(CLIENT_6, SERVER_6)
LONGEST = ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)

#: Whole headers, and the source that they name.
GOOD = [
    (line(), CLIENT),
    (line(CLIENT_6, SERVER_6), CLIENT_6),
    (line(LONGEST, LONGEST), LONGEST),
    (line(("255.255.255.255", 65535), ("0.0.0.0", 0)), ("255.255.255.255", 65535)),
    (line(("2001:DB8:0:0:0::7", 1), SERVER_6), ("2001:db8::7", 1)),
    (line(("::ffff:127.0.0.1", 1), ("::ffff:127.0.0.1", 2)), ("::ffff:127.0.0.1", 1)),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN \r\n", None),
    (b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", None),
    (b"PROXY UNKNOWN 127.0.0.1 127.0.0.1 99999 99999\r\n", None),
    (b"PROXY UNKNOWN \xff\0  PROXY\r\n", None),
    (binary(), CLIENT),
    (binary(V6, TCP6), CLIENT_6),
    (binary(checksum=True), CLIENT),
    (binary(tlvs=[tlv(AUTHORITY, b"12345")]), CLIENT),
    (binary(tlvs=[tlv(NOOP)]), CLIENT),
    (binary(V6, TCP6, tlvs=[tlv(ALPN, b"h2"), tlv(NETNS, b"ns"), tlv(0xFF)]), CLIENT_6),
    (binary(tlvs=[tlv(SSL, b"\1\0\0\0\0" + tlv(0x21, b"TLSv1.3"))], checksum=True), CLIENT),
    (binary(tlvs=[tlv(UNIQUE_ID, bytes(128)), tlv(NOOP, bytes(33))], checksum=True), CLIENT),
    (binary(tlvs=[tlv(0xE0, bytes(HEADER_MAX - 16 - 12 - 3))]), CLIENT),
    (binary(bytes(216), UNIX_STREAM), ""),
    (binary(b"/run/socket".ljust(108, b"\0") * 2, UNIX_STREAM, checksum=True), ""),
    (binary(b"", UNSPEC), None),
    (binary(b"no address of any kind", UNSPEC), None),
    (binary(addresses(), UDP4), None),
    (binary(V6, UDP6), None),
    (binary(bytes(216), UNIX_DATAGRAM), None),
    (binary(bytes(12), 0x10), None),
    (binary(addresses(), UDP4, tlvs=[tlv(ALPN, b"h2")], checksum=True), None),
    (binary(b"", UNSPEC, checksum=True), None),
    (binary(b"", UNSPEC, LOCAL), None),
    (binary(b"", UNSPEC, LOCAL, checksum=True), None),
    (binary(b"", TCP4, LOCAL), None),
    (binary(addresses(), TCP4, LOCAL), None),
    (binary(bytes(HEADER_MAX - 16), 0xFF, LOCAL), None),
]

#: Data that cannot be the beginning of a header, and why.
BAD = [
    (b"GET / HTTP/1.1\r\n", "proxy_absent", "byte 1 is 0x47"),
    (b"hello\n", "proxy_absent", "byte 1 is 0x68"),
    (b"\n", "proxy_absent", "byte 1 is 0x0a"),
    (b" PROXY TCP4", "proxy_absent", "byte 1 is 0x20"),
    (b"proxy TCP4", "proxy_absent", "byte 1 is 0x70"),
    (b"PROXY\r\n", "proxy_absent", "byte 6 is 0x0d"),
    (b"PROXY\tTCP4", "proxy_absent", "byte 6 is 0x09"),
    (b"\r\n\r\nQUIT\n", "proxy_absent", "byte 5 is 0x51"),
    (SIGNATURE[2:] + b"\x21", "proxy_absent", "byte 3 is 0x00"),
    (SIGNATURE[:11] + b"\r", "proxy_absent", "byte 12 is 0x0d"),
    (b"\x16\x03\x01\x02\0\x01", "proxy_absent", "byte 1 is 0x16"),  # TLS
    (b"PROXY \n", "proxy_invalid", "byte 7 is an LF without a CR"),
    (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n", "proxy_invalid", "byte 31 is an LF without a CR"),
    (b"PROXY TCP4 1.2.3.4\r1.2.3.4 1 2\r\n", "proxy_invalid", "byte 19 is a CR without an LF"),
    (b"PROXY UNKNOWN \r\r\n", "proxy_invalid", "byte 15 is a CR without an LF"),
    (b"PROXY UNKNOWN " + b"f" * 92 + b"\r\n", "proxy_invalid", "no CRLF in the first 107 bytes"),
    (b"PROXY " + b" " * 500, "proxy_invalid", "no CRLF in the first 107 bytes"),
    (b"PROXY \r\n", "proxy_invalid", "'' is not TCP4, TCP6 or UNKNOWN"),
    (b"PROXY SOMETHING\r\n", "proxy_invalid", "'SOMETHING' is not TCP4, TCP6 or UNKNOWN"),
    (b"PROXY tcp4 1.2.3.4 1.2.3.4 1 2\r\n", "proxy_invalid", "'tcp4' is not TCP4"),
    (b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n", "proxy_invalid", "'UDP4' is not TCP4"),
    (b"PROXY UNKNOWNS\r\n", "proxy_invalid", "'UNKNOWNS' is not TCP4"),
    (b"PROXY TCP\xb4 1.2.3.4 1.2.3.4 1 2\r\n", "proxy_invalid", r"'TCP\\xb4' is not TCP4"),
    (b"PROXY  TCP4 1.2.3.4 1.2.3.4 1 2\r\n", "proxy_invalid", "'' is not TCP4"),
    (b"PROXY TCP4\r\n", "proxy_invalid", "single spaces, found 2"),
    (b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n", "proxy_invalid", "single spaces, found 5"),
    (b"PROXY TCP4 1.2.3.4 1.2.3.4  1 2\r\n", "proxy_invalid", "single spaces, found 7"),
    (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 \r\n", "proxy_invalid", "single spaces, found 7"),
    (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 3\r\n", "proxy_invalid", "single spaces, found 7"),
    (b"PROXY TCP4 wrong wrong 1 2\r\n", "proxy_invalid", "'wrong' is not a valid TCP4 address"),
    (b"PROXY TCP4 ::1 ::1 1 2\r\n", "proxy_invalid", "'::1' is not a valid TCP4 address"),
    (b"PROXY TCP6 ::1 1.2.3.4 1 2\r\n", "proxy_invalid", "'1.2.3.4' is not a valid TCP6 address"),
    (b"PROXY TCP4 1.2.3.4 1.2.3 1 2\r\n", "proxy_invalid", "'1.2.3' is not a valid TCP4 address"),
    (b"PROXY TCP4 ::ffff:1.2.3.4 1.2.3.4 1 2\r\n", "proxy_invalid", "is not a valid TCP4"),
    (b"PROXY TCP4 1.2.3.04 1.2.3.4 1 2\r\n", "proxy_invalid", "'1.2.3.04' is not a valid TCP"),
    (
        b"PROXY TCP4 1.2.3.4\0 1.2.3.4 1 2\r\n",
        "proxy_invalid",
        r"'1.2.3.4\x00' is not a valid TCP",
    ),
    (b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", "proxy_invalid", "'fe80::1%eth0' is not a valid TCP"),
    (b"PROXY TCP6 1::2::3 ::1 1 2\r\n", "proxy_invalid", "'1::2::3' is not a valid TCP6 address"),
    (b"PROXY TCP6 [::1] ::1 1 2\r\n", "proxy_invalid", "'[::1]' is not a valid TCP6 address"),
    *(
        (
            b"PROXY TCP4 1.2.3.4 1.2.3.4 %s 2\r\n" % port,
            "proxy_invalid",
            f"{port.decode('ascii', 'backslashreplace')!r} is not a valid port",
        )
        for port in (b"080", b"00", b"+80", b"-1", b"8_0", b"\t80", b"65536", b"99999", b"100000")
    ),
    (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 0x50\r\n", "proxy_invalid", "'0x50' is not a valid port"),
    ("PROXY TCP4 1.2.3.4 1.2.3.4 1 ٨٠\r\n".encode(), "proxy_invalid", "is not a valid port"),
    (binary(command=0x11), "proxy_invalid", "the version is 1, not 2"),
    (binary(command=0x31), "proxy_invalid", "the version is 3, not 2"),
    (binary(command=0x30), "proxy_invalid", "the version is 3, not 2"),
    (binary(command=0x22), "proxy_invalid", "the command is 2, not 0 (LOCAL) or 1 (PROXY)"),
    (SIGNATURE + b"\x99\x99\x99\x99", "proxy_invalid", "the version is 9, not 2"),
    (binary(kind=0x41), "proxy_invalid", "unknown address family 4 (the highest is 3, AF_UNIX)"),
    (binary(kind=0x13), "proxy_invalid", "unknown transport protocol 3 (the highest is 2, DGRAM)"),
    (binary(b""), "proxy_invalid", "the length is 0, but the addresses take 12 bytes"),
    (binary(bytes(11)), "proxy_invalid", "the length is 11, but the addresses take 12 bytes"),
    (binary(kind=TCP6), "proxy_invalid", "the length is 12, but the addresses take 36 bytes"),
    (binary(bytes(215), UNIX_STREAM), "proxy_invalid", "the length is 215, but the addresses"),
    (binary(bytes(215), UNIX_DATAGRAM), "proxy_invalid", "the length is 215, but the addresses"),
    (binary(bytes(11), UDP4), "proxy_invalid", "the length is 11, but the addresses take 12"),
    (binary(bytes(35), UDP6), "proxy_invalid", "the length is 35, but the addresses take 36"),
    (binary(b"", UNSPEC, tlvs=[tlv(CRC32C, b"1234")]), "proxy_checksum", "the CRC32c is 0x313233"),
    (binary(kind=UDP4, tlvs=[tlv(CRC32C, b"1234")]), "proxy_checksum", "the CRC32c is 0x313233"),
    (binary(bytes(216), UNIX_DATAGRAM, tlvs=[b"\2\0\5"]), "proxy_invalid", "5 bytes beyond"),
    (
        # As soon as its length is known: nothing has to be received or checked to the end.
        binary(tlvs=[tlv(NOOP, bytes(60_000))], checksum=True)[:16],
        "proxy_invalid",
        "the header takes 60038 bytes, but at most 4096 are allowed",
    ),
    (binary(bytes(HEADER_MAX - 15), 0xFF, LOCAL), "proxy_invalid", "the header takes 4097 bytes"),
    (binary(tlvs=[b"\2\0"]), "proxy_invalid", "inside the TLV that starts at byte 29"),
    (binary(tlvs=[tlv(NOOP), b"\2"]), "proxy_invalid", "inside the TLV that starts at byte 32"),
    (
        binary(tlvs=[b"\2\0\x0a12345"]),
        "proxy_invalid",
        "the TLV of type 0x02 extends 5 bytes beyond the header",
    ),
    (binary(tlvs=[b"\2\0\x041234", b"5"]), "proxy_invalid", "inside the TLV that starts at"),
    (binary(tlvs=[tlv(CRC32C, bytes(3))]), "proxy_invalid", "a single TLV of 4 bytes"),
    (
        binary(tlvs=[tlv(CRC32C, bytes(4))], checksum=True),
        "proxy_invalid",
        "a single TLV of 4 bytes",
    ),
    (binary(tlvs=[tlv(CRC32C, bytes(4))]), "proxy_checksum", "the CRC32c is 0x00000000, but"),
    (binary(checksum=True)[:-1] + b"\0", "proxy_checksum", "the CRC32c is 0x"),
]


def outcome(data: bytes | bytearray) -> Header | tuple[str, str] | None:
    """What is found, or the kind of reason and the reason."""
    try:
        return parse(data)
    except HeaderError as error:
        return WORKER.names[error.counter], str(error)


@pytest.mark.parametrize(("header", "source"), GOOD, ids=range(len(GOOD)))
def test_header_is_found_when_its_last_byte_has_come(
    header: bytes, source: Endpoint | str | None
) -> None:
    for size in {*range(min(len(header), 300)), len(header) - 1}:
        assert parse(header[:size]) is None
    for rest in (b"", b"hello\n", b"\0", header):
        for data in (header + rest, bytearray(header + rest)):
            found = parse(data)
            assert found
            assert found[:2] == (len(header), source)


@pytest.mark.parametrize(("data", "kind", "reason"), BAD, ids=range(len(BAD)))
def test_anything_else_is_rejected_with_the_reason(data: bytes, kind: str, reason: str) -> None:
    found = outcome(data)
    assert isinstance(found, tuple)
    assert found[0] == kind
    assert reason in found[1]
    assert found[1].isprintable()
    assert outcome(bytearray(data)) == found
    refused = [outcome(data[:size]) for size in range(len(data))]
    assert set(refused) <= {None, found}, "the reason depends on how the bytes were split"
    assert refused == sorted(refused, key=bool), "refused bytes were taken back"
    assert outcome(data + b"\r\nmore\r\n") == found


def test_checksum_is_that_of_rfc_3720() -> None:
    """The examples of its appendix B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_each_bit_is_covered_by_the_checksum() -> None:
    """Except for those without which it is none, or is not looked at."""
    header = binary(tlvs=[tlv(UNIQUE_ID, b"unique")], checksum=True)
    command, kind, length, checksum = 12, 13, 15, len(header) - 7
    for bit in range(len(header) * 8):
        changed = bytearray(header)
        changed[bit // 8] ^= 1 << bit % 8
        found = outcome(changed)
        assert not isinstance(found, Header) or bit // 8 in (command, kind, length, checksum)


hosts_4 = st.ip_addresses(v=4).map(str)
hosts_6 = st.ip_addresses(v=6).flatmap(
    # Not host.exploded, which since Python 3.13 may be longer than a header of version 1 allows.
    lambda host: st.sampled_from([str(host), host.packed.hex(":", 2), str(host).upper()])
)
ports = st.integers(0, 65535)
pairs = st.tuples(hosts_4, ports, hosts_4, ports) | st.tuples(hosts_6, ports, hosts_6, ports)
tlvs = st.lists(
    st.tuples(st.integers(0, 255).filter(lambda kind: kind != CRC32C), st.binary(max_size=40)),
    max_size=5,
)


@given(pairs, tlvs, st.booleans(), st.binary(max_size=20))
def test_encoded_header_is_decoded(
    pair: tuple[str, int, str, int],
    extensions: list[tuple[int, bytes]],
    checksum: bool,
    rest: bytes,
) -> None:
    source, destination = pair[:2], pair[2:]
    family = TCP6 if ":" in source[0] else TCP4
    for header in (
        line(source, destination),
        binary(
            addresses(source, destination),
            family,
            tlvs=[tlv(*one) for one in extensions],
            checksum=checksum,
        ),
    ):
        found = parse(header + rest)
        assert found
        assert found.size == len(header)
        assert isinstance(found.source, tuple)
        assert ip_address(found.source[0]) == ip_address(source[0])
        assert found.source[1] == source[1]


# The protocol of a connection


@pytest.mark.parametrize("header", [line(), binary(checksum=True)], ids=["1", "2"])
def test_protocol_answers_nothing_and_keeps_what_follows(header: bytes) -> None:
    for sent in (header, header + b"hello\n", header + header):
        for at in range(1, len(header)):
            protocol = HeaderProtocol(refuse)
            assert not protocol.mid_line
            assert protocol.receive(sent[:at]) == b""
            assert (protocol.finished, protocol.mid_line) == (False, True)
            assert protocol.held == sent[:at]
            heir = HeaderProtocol(refuse)
            assert heir.resume(protocol.lines, protocol.mid_line, bytes(protocol.held)) == b""
            assert heir.mid_line
            assert heir.receive(sent[at:]) == b""
            assert (heir.finished, heir.mid_line, heir.held, heir.lines) == (True, False, b"", 0)
            assert heir.found == parse(header)
            assert heir.rest == sent[len(header) :]


def refuse(connection: object, found: object) -> None:
    """No client is served."""


def test_protocol_says_why_it_refuses() -> None:
    protocol = HeaderProtocol(refuse)
    protocol.receive(b"PRO")
    assert protocol.receive(b"BE\n") == b""
    assert protocol.finished
    assert isinstance(protocol.found, HeaderError)
    assert str(protocol.found) == "not a PROXY header: byte 4 is 0x42"
    assert protocol.rest == b""


@pytest.mark.parametrize("end", [HeaderProtocol.receive_eof, HeaderProtocol.finish])
def test_header_that_ends_too_early_is_incomplete(end: Callable[[HeaderProtocol], object]) -> None:
    protocol = HeaderProtocol(refuse)
    protocol.receive(b"PROXY")
    assert not end(protocol)
    assert (protocol.finished, protocol.mid_line, protocol.held) == (True, False, b"")
    assert isinstance(protocol.found, HeaderError)
    assert WORKER.names[protocol.found.counter] == "proxy_incomplete"
    assert str(protocol.found) == "the header was incomplete after 5 bytes"


@pytest.mark.parametrize("end", [HeaderProtocol.receive_eof, HeaderProtocol.finish])
def test_client_that_never_sent_anything_is_no_error(
    end: Callable[[HeaderProtocol], object],
) -> None:
    protocol = HeaderProtocol(refuse)
    end(protocol)
    assert protocol.finished
    assert protocol.found is None


#: Bytes out of which headers are made, and those next to them.
PARTS = [
    *(b"PROXY", b" ", b"  ", b"TCP4", b"TCP6", b"UNKNOWN", b"1.2.3.4", b"::1", b"\r\n", b"\r"),
    *(b"\n", b"0", b"80", b"65535", b"65536", b"08", b":", b".", b"%", b"\0", b"\xff", SIGNATURE),
    *(b"\x20", b"\x21", b"\x11", b"\x31", b"\0\x0c", b"\0\x24", b"\0\xd8", tlv(CRC32C, bytes(4))),
]


def test_any_bytes_are_a_header_or_refused_alike_at_every_split() -> None:
    """A million of them in `make soak`."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    whole = [header for header, _ in GOOD if len(header) < 500]
    kinds = set()
    for _ in range(scaled(10_000, 1_000_000)):
        data = any_bytes(chance, whole)
        found, half = outcome(data), outcome(data[: chance.randrange(len(data) + 1)])
        assert half in (None, found)
        if isinstance(found, Header):
            assert found.size <= len(data)
            check_source(found.source)
            kinds.add("header")
        elif found:
            assert found[1].isprintable()
            kinds.add(found[0])
    assert kinds == {"header", "proxy_absent", "proxy_invalid", "proxy_checksum"}


def any_bytes(chance: random.Random, whole: list[bytes]) -> bytes:
    """A header with a few errors, or parts of headers in any order."""
    if chance.random() < 0.3:
        return b"PROXY " + b"".join(chance.choices(PARTS, k=chance.randrange(12)))
    if chance.random() < 0.3:
        return b"".join(chance.choices(PARTS, k=chance.randrange(8)))
    data = bytearray(chance.choice(whole))
    for _ in range(chance.randrange(4)):
        place = chance.randrange(len(data) + 1)
        data[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    return bytes(data)


def check_source(source: tuple[str, int] | str | None) -> None:
    """It is as the kernel would have said it."""
    if isinstance(source, tuple):
        host, port = source
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        assert socket.inet_ntop(family, socket.inet_pton(family, host)) == host
        assert 0 <= port <= 65535
    else:
        assert source in ("", None)
