"""Headers of the PROXY protocol as its specification has them, by an encoder that shares nothing
with the daemon's parser."""

from collections.abc import Sequence
from ipaddress import ip_address

#: Host and port.
Endpoint = tuple[str, int]

CLIENT: Endpoint = ("192.0.2.7", 56324)
CLIENT_6: Endpoint = ("2001:db8::7", 56324)
SERVER: Endpoint = ("192.0.2.1", 443)
SERVER_6: Endpoint = ("2001:db8::1", 443)

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")

LOCAL, PROXY = 0x20, 0x21
UNSPEC, TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DATAGRAM = 0, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32

ALPN, AUTHORITY, CRC32C, NOOP, UNIQUE_ID, SSL, NETNS = 1, 2, 3, 4, 5, 0x20, 0x30


def line(source: Endpoint = CLIENT, destination: Endpoint = SERVER) -> bytes:
    """A header of version 1."""
    family = 6 if ":" in source[0] else 4
    (host, port), (other_host, other_port) = source, destination
    return f"PROXY TCP{family} {host} {other_host} {port} {other_port}\r\n".encode()


def tlv(kind: int, value: bytes = b"") -> bytes:
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


def addresses(source: Endpoint = CLIENT, destination: Endpoint = SERVER) -> bytes:
    hosts = b"".join(ip_address(host).packed for host, _ in (source, destination))
    return hosts + b"".join(port.to_bytes(2, "big") for _, port in (source, destination))


def binary(
    rest: bytes = addresses(),
    kind: int = TCP4,
    command: int = PROXY,
    tlvs: Sequence[bytes] = (),
    *,
    checksum: bool = False,
) -> bytes:
    """A header of version 2: addresses, extensions and, as the last of them, a checksum."""
    rest += b"".join(tlvs)
    if checksum:
        rest += tlv(CRC32C, bytes(4))
    header = SIGNATURE + bytes([command, kind]) + len(rest).to_bytes(2, "big") + rest
    return header[:-4] + crc32c(header).to_bytes(4, "big") if checksum else header


def crc32c(data: bytes) -> int:
    """Bit by bit, as the polynomial is divided."""
    rest = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            odd = (rest ^ byte >> bit) & 1
            rest >>= 1
            if odd:
                rest ^= 0x82F63B78
    return rest ^ 0xFFFFFFFF
