"""Addresses, as they are written."""

import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpupperd.address import (
    PATH_MAX,
    SERVICES,
    Address,
    Networks,
    parse_address,
    parse_network,
    source_of,
    split_service,
)
from tcpupperd.events import client_fields
from tcpupperd.host.sockets import Listener
from tcpupperd.serving.server import UpperServer
from tcpupperd.words import plain_host, written

ROOT = Path(__file__).parents[2]

GOOD = [
    ("9999", Address("", 9999)),
    ("0", Address("", 0)),
    ("65535", Address("", 65535)),
    ("00080", Address("", 80)),
    ("localhost:9999", Address("localhost", 9999)),
    ("127.0.0.1:0", Address("127.0.0.1", 0)),
    ("a-host.example.org:1", Address("a-host.example.org", 1)),
    ("[::1]:9999", Address("::1", 9999)),
    ("[::]:9999", Address("::", 9999)),
    ("[fe80::1%lo]:9999", Address("fe80::1%lo", 9999)),
    ("[::ffff:127.0.0.1]:9999", Address("::ffff:127.0.0.1", 9999)),
    ("münchen.example:1", Address("münchen.example", 1)),
    ("1.example:1", Address("1.example", 1)),
    ("/run/tcpupperd.sock", Address(path="/run/tcpupperd.sock")),
    ("/with space:9999", Address(path="/with space:9999")),
    ("@tcpupperd", Address(path="\0tcpupperd")),
    ("@/a:1", Address(path="\0/a:1")),
    ("/" + "x" * (PATH_MAX - 1), Address(path="/" + "x" * (PATH_MAX - 1))),
    ("@" + "é" * 53, Address(path="\0" + "é" * 53)),
]

BAD_PORTS = [
    *("", " ", "localhost", "localhost:", ":9999", "localhost:http", "localhost:65536", "65536"),
    *("-1", "+1", "1.0", "0x10", "1_0", "٣", "²", "000080", "9999\n", "\n9999", " 9999", "9999 "),
    *("localhost:-1", "localhost: 1", "local host:1", "::1:9999", "a:b:1", "[::1]", "[::1]:"),
    *("[]:1", "[[::1]]:1", "[::1:1", "::1]:1", "[::1]9999", "tcp://localhost:1", "user@host:1"),
    *("relative/path", "./path", "*:9999/tcp"),
]

#: With what each host is not.
BAD_HOSTS = [
    *(
        (host, "an IPv4 address")
        for host in ("300.1.1.1", "1.2.3", "1.2.3.4.5", "1", "127.1", "..")
    ),
    *((f"[{host}]", "an IPv6 address") for host in ("::g", "1::2::3", "127.0.0.1", "localhost")),
    *((f"[{host}]", "an IPv6 address") for host in ("fe80::1%", "::1%\0", "é", "\udcff", ":")),
    *((host, "a host name") for host in ("nul\0byte", "é..example", "\udcff", "é" * 64)),
]

BAD_PATHS = ["@", "/", "/" + "x" * PATH_MAX, "@" + "é" * 54, "/nul\0byte", "@nul\0byte"]


def test_services_are_those_whose_spare_listeners_are_released() -> None:
    text = (ROOT / "systemd/release-listeners").read_text()
    assert f'\nservices="{" ".join(SERVICES)}"\n' in text


def test_services_of_addresses_are_those_that_exist() -> None:
    other = "tcpupperd.socket"
    with UpperServer(listeners=[Listener(socket.socket(), other)]) as server:
        assert set(server.services) == {*SERVICES, other}
        assert server.services[other] is server.services[SERVICES[0]]
        protocols = [server.services[name].protocol("client") for name in SERVICES]
        assert [protocol.service for protocol in protocols] == list(SERVICES)


@pytest.mark.parametrize("text", ["localhost:9999", "9999", "/a=b", "@upper=b", "/run/upper=x"])
def test_address_without_a_service_is_upper_cased(text: str) -> None:
    assert split_service(text) == ("upper", text)


@pytest.mark.parametrize("address", ["localhost:9999", "9999", "/a=b", "@a", "a=b", ""])
def test_service_precedes_an_address(address: str) -> None:
    for name in SERVICES:
        assert split_service(f"{name}={address}") == (name, address)


@pytest.mark.parametrize("name", ["", "Upper", " upper", "upper ", "uppe", "upper.socket"])
def test_unknown_service_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(ValueError, match="unknown service") as raised:
        split_service(f"{name}=9999")
    assert str(raised.value) == (
        f'"{name}=9999": unknown service "{name}"; the services are {", ".join(SERVICES)}'
    )


@pytest.mark.parametrize(("text", "address"), GOOD)
def test_address_is_understood(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", BAD_PORTS)
def test_invalid_address_is_rejected_with_the_valid_forms(text: str) -> None:
    with pytest.raises(ValueError, match="must be host:port") as caught:
        parse_address(text)
    assert str(caught.value).startswith(f'"{text}": ')


@pytest.mark.parametrize(("host", "what"), BAD_HOSTS)
def test_host_that_cannot_be_one_is_named(host: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"is not {what}$") as caught:
        parse_address(f"{host}:9999")
    assert str(caught.value) == f'"{host}:9999": "{host.strip("[]")}" is not {what}'


@pytest.mark.parametrize("text", BAD_PATHS)
def test_path_that_no_socket_can_have_is_told_the_limit(text: str) -> None:
    with pytest.raises(ValueError, match=f"must be 1 to {PATH_MAX} bytes long and contain no NUL"):
        parse_address(text)


@given(st.text() | st.text("[]:/@%0123456789abc. \0"))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert 0 <= address.port <= 65535
    assert not (address.host and address.path)
    assert len(os.fsencode(address.path)) <= PATH_MAX


@pytest.mark.parametrize("text", ["@" + "x" * (PATH_MAX - 1), "@é"])
def test_path_that_is_taken_can_be_bound(text: str) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(parse_address(text).path)


LO = socket.if_nametoindex("lo")
NO_INTERFACE = 2**31 - 1


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("192.0.2.7", 5), "192.0.2.7:5"),
        (("::ffff:192.0.2.7", 5, 0, 0), "192.0.2.7:5"),
        (("::ffff:0:102:304", 5, 0, 0), "[::ffff:0:102:304]:5"),
        (("::ffff:102", 5, 0, 0), "[::ffff:102]:5"),
        (("fe80::1", 5, 0, LO), "[fe80::1%lo]:5"),
        (("fe80::1%lo", 5), "[fe80::1%lo]:5"),
        (("fe80::1", 5, 0, NO_INTERFACE), f"[fe80::1%{NO_INTERFACE}]:5"),
        ("/run/socket", "/run/socket"),
        ("", "local client"),
    ],
)
def test_address_is_written_as_it_is_read(address: Any, text: str) -> None:
    assert written(address) == text
    if text.startswith("["):
        assert parse_address(text) == Address(text[1:].partition("]")[0], 5)


def test_ipv4_mapped_addresses_are_those_of_the_library() -> None:
    for text in (
        "::ffff:1.2.3.4",
        "::ffff:0:102:304",
        "::ffff:102",
        "::fffe:1.2.3.4",
        "::1.2.3.4",
    ):
        host = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text))
        mapped = ipaddress.IPv6Address(text).ipv4_mapped
        assert plain_host(host) == (str(mapped) if mapped else host)


def test_link_local_network_is_that_of_its_interface() -> None:
    one, same, other = ("fe80::1", 5, 0, LO), ("fe80::2%lo", 6), ("fe80::1", 5, 0, NO_INTERFACE)
    assert source_of(one) == source_of(same) != source_of(other)


def test_fields_of_a_link_local_client_have_the_interface() -> None:
    assert client_fields(("fe80::1", 5, 0, LO)) == {
        "TCPUPPERD_CLIENT": "fe80::1%lo",
        "TCPUPPERD_PORT": 5,
    }


# Networks

hosts = st.ip_addresses(v=4) | st.ip_addresses(v=6)
mapped = ipaddress.ip_network("::ffff:0:0/96")


@given(hosts.filter(lambda host: host not in mapped), st.integers(0, 128), hosts)
def test_networks_are_those_of_the_library(
    host: ipaddress.IPv4Address | ipaddress.IPv6Address,
    prefix: int,
    other: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    network = ipaddress.ip_network((host, prefix % (host.max_prefixlen + 1)), strict=False)
    networks = Networks([str(network)])
    assert (str(host), 1) in networks
    other = getattr(other, "ipv4_mapped", None) or other
    assert ((str(other), 1) in networks) == (other in network)


def test_client_is_found_however_its_address_is_written() -> None:
    networks = Networks(["192.0.2.0/24", "fe80::/10", "::1"])
    assert ("192.0.2.255", 1) in networks
    assert ("::ffff:192.0.2.1", 1, 0, 0) in networks
    assert ("fe80::1%eth0", 1, 0, 2) in networks
    assert ("::1", 1, 0, 0) in networks
    for host in ("192.0.3.0", "::ffff:192.0.1.1", "fec0::1%eth0", "::2", "127.0.0.1"):
        assert (host, 1) not in networks
    assert ("192.0.2.1", 1) in Networks(["0.0.0.0/0"])
    assert ("192.0.2.1", 1) not in Networks(["::/0"])
    assert ("192.0.2.1", 1) not in Networks([])
    assert "" in Networks([])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must be an IP address or a network such as 192.0.2.0/24"),
        ("localhost", "must be an IP address or a network such as 192.0.2.0/24"),
        ("10.1", "must be an IP address or a network such as 192.0.2.0/24"),
        ("10.0.0.01", "must be an IP address or a network such as 192.0.2.0/24"),
        ("[::1]", "must be an IP address or a network such as 192.0.2.0/24"),
        ("fe80::1%eth0", "must be an IP address or a network such as 192.0.2.0/24"),
        ("::ffff:10.0.0.1", "is an IPv4-mapped IPv6 address; write it as an IPv4 address"),
        ("::ffff:0:0/96", "is an IPv4-mapped IPv6 address; write it as an IPv4 address"),
        ("10.0.0.0/33", "the prefix length must be a number from 0 to 32"),
        ("::/129", "the prefix length must be a number from 0 to 128"),
        ("10.0.0.0/", "the prefix length must be a number from 0 to 32"),
        ("10.0.0.0/08", "the prefix length must be a number from 0 to 32"),
        ("10.0.0.0/255.0.0.0", "the prefix length must be a number from 0 to 32"),
        ("10.0.0.5/8", 'has host bits set; write "10.0.0.0/8"'),
        ("2001:db8::1/32", 'has host bits set; write "2001:db8::/32"'),
    ],
)
def test_invalid_network_is_rejected_with_the_remedy(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f'"{text}": {reason}')):
        parse_network(text)


@given(st.text() | st.text(":/%0123456789abc. \0"))
def test_any_text_is_a_network_or_a_value_error(text: str) -> None:
    try:
        packed, prefix = parse_network(text)
    except ValueError:
        return
    assert prefix <= 8 * len(packed)
