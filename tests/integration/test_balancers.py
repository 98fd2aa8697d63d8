"""HAProxy and nginx identify their clients with PROXY headers."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.balancers import haproxy, nginx
from integration.client import endpoint
from integration.daemon import Daemon
from waiting import DEADLINE, until

#: Options of the keyword `server` that change the header.
OPTIONS = {
    "v1": "send-proxy",
    "v2": "send-proxy-v2",
    "crc32c": "send-proxy-v2 proxy-v2-options crc32c",
    "ssl": "send-proxy-v2-ssl",
    "ssl-cn": "send-proxy-v2-ssl-cn",
    "all": "send-proxy-v2 proxy-v2-options ssl,cert-cn,ssl-cipher,cert-sig,cert-key,authority,"
    "crc32c,unique-id",
}

HOSTS = [("127.0.0.1", "127.0.0.2"), ("::1", "::1")]


@contextmanager
def connected(address: str, source: str) -> Iterator[tuple[socket.socket, str]]:
    """A client at a certain address, which it writes as the daemon does."""
    where = endpoint(address)
    with socket.create_connection(where, DEADLINE, source_address=(source, 0)) as client:
        port = client.getsockname()[1]
        yield client, f"[{source}]:{port}" if ":" in source else f"{source}:{port}"


def check(daemon: Daemon, address: str, source: str) -> None:
    """A client of a balancer is answered, and known by its own address."""
    with connected(address, source) as (client, name):
        client.sendall(b"hello\nlast")
        client.shutdown(socket.SHUT_WR)
        assert client.makefile("rb").read() == b"HELLO\nLAST"
        assert f" {name}: connected through 127.0.0.1:" in daemon.log
        until(lambda: f" {name}: closed after 2 lines" in daemon.log)


@pytest.mark.parametrize(("host", "source"), HOSTS, ids=["IPv4", "IPv6"])
def test_haproxy_introduces_its_clients(tmp_path: Path, host: str, source: str) -> None:
    with Daemon(listen=["proxy=127.0.0.1:0"], log_level="debug") as daemon:
        server = daemon.addresses[0].removeprefix("proxy=")
        with haproxy(tmp_path, server, OPTIONS, host) as frontends:
            for address in frontends.values():
                check(daemon, address, source)
        assert "WARNING" not in daemon.log


@pytest.mark.parametrize(("host", "source"), HOSTS, ids=["IPv4", "IPv6"])
def test_nginx_introduces_its_clients(tmp_path: Path, host: str, source: str) -> None:
    with Daemon(listen=["proxy=127.0.0.1:0"], log_level="debug") as daemon:
        server = daemon.addresses[0].removeprefix("proxy=")
        with nginx(tmp_path, server, host) as address:
            check(daemon, address, source)
        assert "WARNING" not in daemon.log


@pytest.mark.parametrize("options", ["send-proxy", "send-proxy-v2", OPTIONS["crc32c"]])
def test_health_checks_of_haproxy_leave_no_line(tmp_path: Path, options: str) -> None:
    """With version 2, it introduces itself (LOCAL), then resets the connection."""
    with Daemon(listen=["proxy=127.0.0.1:0"]) as daemon:
        server = daemon.addresses[0].removeprefix("proxy=")
        options += " check check-send-proxy inter 50ms fall 1000"  # a late one is no failure
        with haproxy(tmp_path, server, {"checked": options}) as frontends:
            until(lambda: daemon.counters()["probe"] >= 3)
            with connected(frontends["checked"], "127.0.0.2") as (client, _):
                client.sendall(b"hello\n")
                assert client.recv(100) == b"HELLO\n"
        until(lambda: daemon.counters()["lines"] == 1)
        assert "WARNING" not in daemon.log


def test_haproxy_that_sends_no_header_is_told_so_in_the_log(tmp_path: Path) -> None:
    with Daemon(listen=["proxy=127.0.0.1:0"]) as daemon:
        server = daemon.addresses[0].removeprefix("proxy=")
        with (
            haproxy(tmp_path, server, {"plain": ""}) as frontends,
            connected(frontends["plain"], "127.0.0.2") as (client, _),
        ):
            client.sendall(b"hello\n")
            assert client.recv(100) == b""
        assert "PROXY header rejected: not a PROXY header: byte 1 is 0x68" in daemon.log


def test_introduced_clients_outlive_a_reload_behind_haproxy(tmp_path: Path) -> None:
    with Daemon(listen=["proxy=127.0.0.1:0"], log_level="debug") as daemon:
        server = daemon.addresses[0].removeprefix("proxy=")
        with (
            haproxy(tmp_path, server, {"v2": "send-proxy-v2"}) as frontends,
            connected(frontends["v2"], "127.0.0.2") as (client, name),
        ):
            client.sendall(b"half a ")
            until(lambda: f"{name}: received 7 bytes" in daemon.log)
            daemon.reload()
            client.sendall(b"line\n")
            assert client.recv(100) == b"HALF A LINE\n"
            until(lambda: f"{name}: taken over" in daemon.log)
