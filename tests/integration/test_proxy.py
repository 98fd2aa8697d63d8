"""Clients that a load balancer identifies with a PROXY header."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.client import Client
from integration.daemon import Daemon, Shared
from integration.embedding import connected, serving
from integration.service import Service
from proxy_headers import (
    CLIENT_6,
    CRC32C,
    LOCAL,
    NOOP,
    SERVER_6,
    TCP6,
    UNIX_STREAM,
    UNSPEC,
    addresses,
    binary,
    line,
    tlv,
)
from tcpupperd.events import Event
from tcpupperd.host.messages import RateLimitedLog
from tcpupperd.host.sockets import Listener
from tcpupperd.serving.proxy import HEADER_MAX
from tcpupperd.serving.server import UpperServer
from waiting import until

HEADERS = [line(), binary(checksum=True)]

#: Anything that is refused, the counter of it and the reason in the log.
REFUSED = [
    (b"hello\n", "proxy_absent", "not a PROXY header: byte 1 is 0x68"),
    (b"PROXY TCP4 1.2.3.4 1.2.3.4 +80 2\r\nhello\n", "proxy_invalid", "'+80' is not a valid port"),
    (binary(tlvs=[b"\2\0\x0a12345"]), "proxy_invalid", "the TLV of type 0x02 extends 5 bytes"),
    (binary(tlvs=[tlv(CRC32C, bytes(4))]), "proxy_checksum", "the CRC32c is 0x00000000, but"),
]


class Balanced(Shared):
    """A daemon that is only reached through a load balancer, which the test is."""

    def __init__(self, listen: str = "127.0.0.1:0", **settings: Any) -> None:
        super().__init__(listen=[f"proxy={listen}"], **settings)

    def balancer(self, header: bytes = b"") -> Client:
        """A connection of the load balancer."""
        client = self.connect(self.addresses[0].removeprefix("proxy="))
        client.send(header)
        return client


@pytest.fixture(scope="module")
def shared() -> Iterator[Balanced]:
    with Balanced(workers=1, log_level="debug") as daemon:
        yield daemon


@pytest.fixture
def daemon(shared: Balanced) -> Balanced:
    shared.renew()
    return shared


def replace_workers(daemon: Daemon, **settings: Any) -> None:
    """Reload and wait until the old workers, which accept connections for a moment longer, have
    exited."""
    old = daemon.workers()
    daemon.reload(**settings)
    until(lambda: not set(old) & set(daemon.workers()))


@pytest.mark.parametrize("header", HEADERS, ids=["version 1", "version 2"])
@pytest.mark.parametrize("pieces", ["one", "two", "bytes"])
def test_client_is_answered_and_logged_by_its_own_address(
    daemon: Balanced, header: bytes, pieces: str
) -> None:
    sizes = {"one": len(header) + 20, "two": len(header), "bytes": 1}
    client = daemon.balancer()
    sent, size = header + b"hello\nwor", sizes[pieces]
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(0, len(sent), size):
        client.send(sent[at : at + size])
    assert client.read_line() == b"HELLO\n"
    assert client.ask(b"ld") == b"WORLD"
    client.end()
    assert client.read_to_end() == b""
    through = f"192.0.2.7:56324: connected through 127.0.0.1:{client.port}"
    assert through in daemon.log
    until(lambda: "192.0.2.7:56324: closed after 2 lines" in daemon.log)
    until(lambda: daemon.counters()["lines"] == 2)


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (line(CLIENT_6, SERVER_6), "[2001:db8::7]:56324"),
        (line(("::ffff:192.0.2.9", 80), SERVER_6), "192.0.2.9:80"),
        (binary(addresses(CLIENT_6, SERVER_6), TCP6), "[2001:db8::7]:56324"),
        (binary(bytes(216), UNIX_STREAM), "local client"),
        (binary(tlvs=[tlv(NOOP, bytes(HEADER_MAX - 16 - 15))]), "192.0.2.7:56324"),
    ],
    ids=["IPv6", "IPv4-mapped", "IPv6 of version 2", "Unix", "the longest header"],
)
def test_client_may_be_of_any_family(daemon: Balanced, header: bytes, client: str) -> None:
    assert daemon.balancer(header).ask(b"hello") == b"HELLO"
    assert f"{client}: connected through 127.0.0.1:" in daemon.log


@pytest.mark.parametrize(
    "header",
    [b"PROXY UNKNOWN\r\n", binary(b"", UNSPEC, LOCAL), binary(b"", UNSPEC, LOCAL, checksum=True)],
    ids=["UNKNOWN", "LOCAL", "LOCAL with a checksum"],
)
def test_connection_of_the_balancer_itself_keeps_its_address(
    daemon: Balanced, header: bytes
) -> None:
    client = daemon.balancer(header)
    assert client.ask(b"hello") == b"HELLO"
    address = f"127.0.0.1:{client.port}"
    assert f"{address}: connected through {address}" in daemon.log


def test_header_on_a_plain_listener_is_a_line_like_any_other() -> None:
    with Daemon() as daemon:
        assert daemon.connect().ask(line().strip(b"\n")) == line().strip(b"\n").upper()


def test_client_on_a_unix_socket_is_introduced_too(tmp_path: Path) -> None:
    with Balanced(f"{tmp_path}/socket", log_level="debug", proxy_from=[]) as daemon:
        assert daemon.balancer(line()).ask(b"hello") == b"HELLO"
        assert "192.0.2.7:56324: connected through local client" in daemon.log


# Refused


@pytest.mark.parametrize(("sent", "counter", "reason"), REFUSED)
def test_invalid_header_is_rejected_and_the_reason_is_logged(
    sent: bytes, counter: str, reason: str
) -> None:
    with Balanced(idle_timeout=0, line_timeout=0) as daemon:
        client = daemon.balancer(sent)
        assert client.read_to_end() == b""
        assert f"WARNING 127.0.0.1:{client.port}: PROXY header rejected: {reason}" in daemon.log
        counters = daemon.counters()
        assert (counters[counter], counters["lines"]) == (1, 0)
        until(lambda: daemon.counters()["open"] == 0)


def test_header_from_an_address_outside_proxy_from_is_rejected() -> None:
    with Balanced(proxy_from=["192.0.2.0/24", "::1"]) as daemon:
        client = daemon.balancer(line())
        assert client.read_to_end() == b""
        reason = "PROXY header rejected: the address is not in proxy_from"
        assert f"WARNING 127.0.0.1:{client.port}: {reason}" in daemon.log
        assert daemon.counters()["proxy_untrusted"] == 1
        replace_workers(daemon, proxy_from=["127.0.0.1"])
        assert daemon.balancer(line()).ask(b"hello") == b"HELLO"


def test_header_that_ends_early_is_incomplete() -> None:
    with Balanced(idle_timeout=0, line_timeout=0) as daemon:
        client = daemon.balancer(b"PROXY")
        client.end()
        assert client.read_to_end() == b""
        assert "PROXY header rejected: the header was incomplete after 5 bytes" in daemon.log
        assert daemon.counters()["proxy_incomplete"] == 1


def test_header_that_does_not_end_in_time_is_incomplete() -> None:
    """line_timeout applies to it. Before its first byte, the connection is idle: a balancer may
    send the header only together with what its client sends first."""
    with Balanced(idle_timeout=0, line_timeout=0.2) as daemon:
        silent, half = daemon.balancer(), daemon.balancer(line()[:20])
        assert half.read_to_end() == b""
        assert "PROXY header rejected: the header was incomplete after 20 bytes" in daemon.log
        counters = daemon.counters()
        assert (counters["proxy_incomplete"], counters["line_timeout"]) == (1, 0)
        silent.send(line())
        assert silent.ask(b"hello") == b"HELLO"


def test_silent_balancer_is_closed_at_idle_timeout_without_a_complaint() -> None:
    with Balanced(idle_timeout=0.2) as daemon:
        assert daemon.balancer().read_to_end() == b""
        assert daemon.counters()["idle_timeout"] == 1
        assert "WARNING" not in daemon.log


def test_refusal_is_an_event_with_the_address_of_the_balancer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = Listener(socket.create_server(("127.0.0.1", 0)), "proxy")
    with serving(UpperServer(listeners=[listener])) as server, connected(server) as client:
        client.send(b"hello\n")
        assert client.read_to_end() == b""
        where = {"TCPUPPERD_CLIENT": "127.0.0.1", "TCPUPPERD_PORT": client.port}
    (record,) = caplog.records
    expected = Event.PROXY_REFUSED.fields(**where)["fields"]
    assert record.__dict__["fields"] == expected


def test_refusals_do_not_flood_the_log() -> None:
    with Balanced(workers=1) as daemon:
        began = time.monotonic()
        for _ in range(200):
            assert daemon.balancer(b"hello\n").read_to_end() == b""
        assert daemon.counters()["proxy_absent"] == 200
        said = daemon.log.count("PROXY header rejected")
        assert 1 <= said <= 1 + (time.monotonic() - began) // RateLimitedLog.INTERVAL


def test_health_checks_are_probes() -> None:
    """They connect and go, with or without a header."""
    with Balanced(workers=1) as daemon:
        checks = [daemon.balancer(header) for header in [b"", binary(b"", UNSPEC, LOCAL)] * 3]
        until(lambda: daemon.counters()["open"] == len(checks))
        for check in checks:
            check.reset()
        until(lambda: daemon.counters()["probe"] == len(checks))
        assert "WARNING" not in daemon.log


# Limits


def test_limit_of_a_source_counts_clients_not_the_balancer() -> None:
    with Balanced(workers=1, max_connections_per_source=2) as daemon:
        idle = [daemon.balancer() for _ in range(4)]
        first, second = (daemon.balancer(line()) for _ in range(2))
        assert [first.ask(b"one"), second.ask(b"two")] == [b"ONE", b"TWO"]
        assert daemon.balancer(line() + b"three\n").read_to_end() == b""
        assert (
            "192.0.2.7 already has max_connections_per_source connections open; closed another"
            in daemon.log
        )
        assert daemon.counters()["source_limit"] == 1
        for number, client in enumerate(idle):
            client.send(binary(addresses((f"198.51.100.{number}", 1))))
            assert client.ask(b"other") == b"OTHER"

        # The place of a client that disconnects is free again, even after a reload.
        replace_workers(daemon)
        until(lambda: daemon.counters()["handed_over_in"] == 6)
        assert daemon.balancer(line()).read_to_end() == b""
        first.close()
        until(lambda: daemon.counters()["open"] == 5)
        assert daemon.balancer(line()).ask(b"again") == b"AGAIN"


def test_balancer_without_a_header_counts_as_itself() -> None:
    with Balanced(workers=1, max_connections_per_source=1) as daemon:
        local = binary(b"", UNSPEC, LOCAL)
        assert daemon.balancer(local).ask(b"one") == b"ONE"
        assert daemon.balancer(local).read_to_end() == b""
        assert daemon.balancer(line()).ask(b"one") == b"ONE"


def test_each_of_many_clients_is_known_by_its_own_address() -> None:
    many = 1000
    with Balanced(workers=1, log_level="debug", max_connections_per_source=1) as daemon:
        clients = [
            daemon.balancer(binary(addresses((f"10.0.{number // 256}.{number % 256}", number))))
            for number in range(many)
        ]
        for number, client in enumerate(clients):
            assert client.ask(b"%d" % number) == b"%d" % number
        log = daemon.log
        for number, client in enumerate(clients):
            source = f"10.0.{number // 256}.{number % 256}:{number}"
            assert f" {source}: connected through 127.0.0.1:{client.port}\n" in log
            assert f" {source}: received " in log
        for number in range(10):
            again = daemon.balancer(binary(addresses((f"10.0.1.{number}", 1))))
            assert again.read_to_end() == b""


# Handover


@pytest.mark.parametrize("framing", ["line", "none"])
@pytest.mark.usefixtures("many_in_flight")
def test_header_and_client_outlive_restarts(service: Service, framing: str) -> None:
    service.name = "proxy"
    headers = [*HEADERS, binary(addresses(CLIENT_6, SERVER_6), TCP6, tlvs=[tlv(NOOP, bytes(999))])]
    parts = [(header, at) for header in headers for at in range(len(header) + 1)][:: len(headers)]
    settings: dict[str, Any] = {"framing": framing, "log_level": "debug"}
    with service.daemon(**settings):
        clients = [service.connect() for _ in parts]
        for client, (header, at) in zip(clients, parts, strict=True):
            client.send(header[:at])
    with service.daemon(**settings) as daemon:
        for client, (header, at) in zip(clients, parts, strict=True):
            client.send(header[at:] + b"half a ")
        halves = sum(at < len(header) for header, at in parts)
        until(lambda: daemon.log.count(": connected through ") >= halves)
        daemon.reload()
    with service.daemon(**settings) as daemon:
        for client in clients:
            client.send(b"line\n")
            assert client.read(12) == b"HALF A LINE\n"
        assert daemon.log.count("192.0.2.7:56324: taken over") > 10
        assert daemon.log.count("[2001:db8::7]:56324: taken over") > 10
        until(lambda: daemon.counters()["open"] == len(clients))
        assert "refused" not in daemon.log.partition("counters: ")[0]


def test_limit_of_a_source_outlives_a_restart(service: Service) -> None:
    service.name = "proxy"
    settings: dict[str, Any] = {"workers": 1, "max_connections_per_source": 1}
    with service.daemon(**settings) as daemon:
        known, half = service.connect(), service.connect()
        known.send(line())
        assert known.ask(b"one") == b"ONE"
        half.send(line()[:-1])
        until(lambda: daemon.counters()["open"] == 2)
    with service.daemon(**settings) as daemon:
        half.send(b"\n")
        assert half.read_to_end() == b""
        assert daemon.counters()["source_limit"] == 1
        assert known.ask(b"two") == b"TWO"


def test_header_ends_in_time_over_a_restart(service: Service) -> None:
    service.name = "proxy"
    with service.daemon():
        client = service.connect()
        client.send(b"PROXY ")
    with service.daemon(line_timeout=0.2) as daemon:
        assert client.read_to_end() == b""
        assert daemon.counters()["proxy_incomplete"] == 1


def test_listener_may_change_from_plain_to_proxy_by_a_reload() -> None:
    with Daemon(listen=["127.0.0.1:0"]) as daemon:
        where = daemon.addresses[0]
        daemon.reload(listen=[where])
        plain = daemon.connect(where)
        assert plain.ask(b"old") == b"OLD"  # accepted before the reload
        replace_workers(daemon, listen=[f"proxy={where}"])
        client = daemon.connect(where)
        client.send(line())
        assert client.ask(b"new") == b"NEW"
        assert plain.ask(b"old") == b"OLD"


def test_stop_answers_a_client_that_is_introduced_meanwhile() -> None:
    with Balanced() as daemon:
        client, half, silent = map(daemon.balancer, [line()[:9], b"P", b""])
        until(lambda: daemon.counters()["open"] == 3)
        client.send(line()[9:] + b"last\n")
        daemon.stop()
        assert client.read_to_end() == b"LAST\n"
        assert half.read_to_end() == silent.read_to_end() == b""
        assert "refused" not in daemon.log.rpartition("counters: ")[2].partition("\n")[2]
