"""What a PROXY header says about a client besides its address."""

import pytest

from proxy_headers import (
    ALPN,
    AUTHORITY,
    CLIENT_6,
    SERVER_6,
    SSL,
    TCP6,
    UNIQUE_ID,
    UNSPEC,
    addresses,
    binary,
    line,
    tlv,
)
from tcpupperd.config import Config
from tcpupperd.serving.greeting import Greeting
from tcpupperd.serving.introduction import TEXT_MAX, Introduction, introduction
from tcpupperd.serving.proxy import parse
from tcpupperd.settings import INTRODUCED

BALANCER = ("198.51.100.1", 4567)
WHERE = {"balancer": "198.51.100.1", "balancer_port": "4567", "destination": "192.0.2.1:443"}
TLS = tlv(0x21, b"TLSv1.3") + tlv(0x22, b"Anna") + tlv(0x23, b"TLS_AES_256_GCM_SHA384")


def of(header: bytes, balancer: object = BALANCER) -> Introduction:
    found = parse(header)
    assert found
    return introduction(found, balancer)


def test_addresses() -> None:
    assert of(line()) == of(binary()) == WHERE
    header = binary(addresses(CLIENT_6, SERVER_6), TCP6)
    assert of(header)["destination"] == "[2001:db8::1]:443"
    assert of(binary(b"", UNSPEC), "/run/socket") == {}


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        (tlv(AUTHORITY, b"example.org"), {"authority": "example.org"}),
        (tlv(ALPN, b"h2"), {"alpn": "h2"}),
        (tlv(UNIQUE_ID, b"C0000207:ABCD"), {"unique_id": "C0000207:ABCD"}),
        (
            tlv(SSL, b"\7\0\0\0\0" + TLS),
            {"tls_version": "TLSv1.3", "tls_cn": "Anna", "tls_cipher": "TLS_AES_256_GCM_SHA384"},
        ),
        (
            tlv(SSL, b"\7\0\0\0\1" + TLS),  # not verified
            {"tls_version": "TLSv1.3", "tls_cipher": "TLS_AES_256_GCM_SHA384"},
        ),
        (tlv(SSL, b"\1\0\0"), {}),
        (tlv(SSL, b"\1\0\0\0\0" + TLS[:12]), {"tls_version": "TLSv1.3"}),
        (tlv(0xEA, b"\1vpce-08d2bf15fac5001c9"), {"aws_vpce_id": "vpce-08d2bf15fac5001c9"}),
        (tlv(0xEA, b"\2other"), {}),
        (tlv(0xE0, bytes(6) + b"\1\2"), {"gcp_psc_connection_id": "258"}),
        (tlv(0xE0, b"short"), {}),
        (tlv(0xEE, b"\1\2\1\0\0"), {"azure_link_id": "258"}),
        (tlv(0xEE, b"\1"), {}),
        (tlv(AUTHORITY, b"a\nb\x1b[31m\xff\xc3\xa9"), {"authority": r"a\nb\x1b[31m\xffé"}),
        (tlv(AUTHORITY, b"x" * 1000), {"authority": "x" * TEXT_MAX}),
        (tlv(AUTHORITY, b"\0" * 1000), {"authority": r"\x00" * (TEXT_MAX // 4)}),
        (tlv(AUTHORITY, b"first") + tlv(AUTHORITY, b"second"), {"authority": "first"}),
        (tlv(0xF0, b"unknown"), {}),
    ],
)
def test_extensions(extension: bytes, said: dict[str, str]) -> None:
    assert of(binary(tlvs=[extension], checksum=True)) == WHERE | said


def test_names_are_those_of_the_placeholders() -> None:
    cloud = [tlv(0xEA, b"\1a"), tlv(0xE0, bytes(8)), tlv(0xEE, b"\1abcd")]
    texts = [tlv(AUTHORITY, b"a"), tlv(ALPN, b"a"), tlv(UNIQUE_ID, b"a")]
    all_of_them = of(binary(tlvs=[*texts, *cloud, tlv(SSL, b"\7\0\0\0\0" + TLS)]))
    assert all_of_them.keys() == set(INTRODUCED)


def test_greeting_tells_the_client_how_it_came() -> None:
    template = "{client} through {balancer} to {destination} as {authority}, {alpn}"
    greeting = Greeting.of(Config(greeting=template), "name")
    assert greeting
    said = of(binary(tlvs=[tlv(AUTHORITY, b"{alpn}{client}")]))
    expected = "192.0.2.7:5 through 198.51.100.1 to 192.0.2.1:443 as {alpn}{client}, -\n"
    assert greeting.line(("192.0.2.7", 5), said).decode() == expected
    assert greeting.line(("192.0.2.7", 5), {}) == b"192.0.2.7:5 through - to - as -, -\n"
