"""The examples that run in front of the service, at addresses and ports of the test's own."""

import contextlib
import random
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from haproxy import HAProxy
from integration.daemon import Daemon
from tools import need
from waiting import DEADLINE, until

EXAMPLES = Path(__file__).parents[2] / "examples"

#: Of HAProxy.
NAMES = ("haproxy.cfg", "tls.cfg", "send-proxy.cfg", "sticky.cfg")

#: The balancer's ports, and its servers': those of the examples, which may be in use, and 20000.
LINES, TLS, INTRODUCED, STICKY = 29999, 29993, 29994, 29995
UPPER, METRICS, PROXY, AGENT = 29999, 29998, 29997, 29996


#: How the greetings of the servers begin.
ALL = {"server 0", "server 1", "server 2"}


@pytest.fixture
def host() -> str:
    """An address of this host that nothing else uses."""
    return ".".join(["127", *(str(random.randrange(1, 255)) for _ in range(3))])


class Servers(NamedTuple):
    """Three servers."""

    daemons: list[Daemon]
    addresses: dict[str, str]  # those of the examples, and what is instead of them


@pytest.fixture
def servers() -> Iterator[Servers]:
    network = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
    addresses = {f"192.0.2.{number}": f"{network}.{number}" for number in (11, 12, 13)}
    with contextlib.ExitStack() as stack:
        daemons = []
        for number, address in enumerate(addresses.values()):
            ports = {"upper": UPPER, "proxy": PROXY, "agent": AGENT, "metrics": METRICS}
            listen = [f"{service}={address}:{port}" for service, port in ports.items()]
            greeting = f"server {number} has {{client}}"
            daemon = Daemon(
                listen=listen, greeting=greeting, proxy_from=["127.0.0.0/8"], workers=1
            )
            daemons.append(stack.enter_context(daemon))
        yield Servers(daemons, addresses)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for "localhost" and its key, in one file."""
    file = tmp_path / "tcpupperd.pem"
    key = tmp_path / "key.pem"
    options = ("-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2")
    command = (need("openssl"), "req", "-x509", *options, "-keyout", str(key), "-out", str(file))
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    file.write_text(file.read_text() + key.read_text())
    return file


@contextmanager
def haproxy(folder: Path, host: str, servers: Servers, certificate: Path) -> Iterator[HAProxy]:
    """HAProxy with all of its examples, at an address of this host."""
    changes = {
        **servers.addresses,
        "bind :": f"bind {host}:",
        "/run/haproxy": str(folder),
        "/etc/haproxy/tcpupperd.pem": str(certificate),
        # They need root.
        "    user haproxy\n    group haproxy\n": "",
    }
    files = [changed(folder, f"haproxy/{name}", changes) for name in NAMES]
    options = [word for file in files for word in ("-f", str(file))]
    with running(need("haproxy"), *options):
        yield HAProxy(folder / "admin.sock")


def test_haproxy_serves_from_all_servers_with_and_without_tls(
    tmp_path: Path, host: str, servers: Servers, certificate: Path
) -> None:
    with haproxy(tmp_path, host, servers, certificate):
        until(lambda: serves_from(host) == ALL)  # a check may be late, and a server missed
        assert ask(host, TLS, certificate)[1] == "HELLO"


def test_haproxy_introduces_its_clients(
    tmp_path: Path, host: str, servers: Servers, certificate: Path
) -> None:
    with (
        haproxy(tmp_path, host, servers, certificate) as balancer,
        connected(host, INTRODUCED) as client,
    ):
        port = client.getsockname()[1]
        greeting, answer = exchange(client)
        assert greeting.endswith(f" has 127.0.0.1:{port}")
        assert answer == "HELLO"
        # The health checks come with the header, too.
        until(lambda: "L7OK" in balancer.check("tcpupperd-proxy", "one"))


def test_agent_leaves_alone_what_an_administrator_has_set(
    tmp_path: Path, host: str, servers: Servers, certificate: Path
) -> None:
    with haproxy(tmp_path, host, servers, certificate) as balancer:
        until(balancer.sees_all)
        balancer.tell("set server tcpupperd/one state drain")
        balancer.wait_until_missed("one")
        asked = servers.daemons[0].counters()["requests_agent"]
        until(lambda: servers.daemons[0].counters()["requests_agent"] >= asked + 5)
        assert "DRAIN" in balancer.status("one")


def test_sticky_clients_leave_a_server_that_is_not_ready(
    tmp_path: Path, host: str, servers: Servers, certificate: Path
) -> None:
    """A weight of 0 does not move them, nor the state "drain"."""
    with haproxy(tmp_path, host, servers, certificate) as balancer:
        checks = partial(balancer.check, "tcpupperd-sticky")
        until(lambda: set(map(checks, HAProxy.SERVERS)) == {"L7OK"})
        with connected(host, STICKY) as client:
            stays = exchange(client)[0][:8]
            assert {ask(host, STICKY)[0][:8] for _ in range(6)} == {stays}
            number = int(stays[-1])
            server = HAProxy.SERVERS[number]
            for command in ("weight 0", "state drain"):
                balancer.tell(f"set server tcpupperd-sticky/{server} {command}")
                assert ask(host, STICKY)[0][:8] == stays
            balancer.tell(f"set server tcpupperd-sticky/{server} state ready")
            balancer.tell(f"set server tcpupperd-sticky/{server} weight 100%")
            daemon = servers.daemons[number]
            daemon.reload(shutdown_delay=3600)
            daemon.send_signal(signal.SIGTERM)
            # Each client is answered, and in the end by another server.
            until(lambda: moved(host, stays))
            client.sendall(b"still\n")
            assert client.recv(100) == b"STILL\n"


def moved(host: str, before: str) -> bool:
    """Whether a client, which is answered, gets another server than before."""
    greeting, answer = ask(host, STICKY)
    assert answer == "HELLO"
    return not greeting.startswith(before)


def test_nginx_serves_from_all_servers(tmp_path: Path, host: str, servers: Servers) -> None:
    nginx = need("nginx")
    changes = {
        **servers.addresses,
        "listen ": f"listen {host}:",
        "/run": str(tmp_path),
        "/var/log/nginx": str(tmp_path),
        "user www-data;": "",
    }
    file = changed(tmp_path, "nginx/nginx.conf", changes)
    with running(nginx, "-c", str(file), "-e", "stderr", "-g", "daemon off;"):
        until(lambda: serves_from(host) == ALL)


def test_stunnel_tells_who_the_client_is(tmp_path: Path, host: str, certificate: Path) -> None:
    stunnel = need("stunnel4")
    changes = {
        "accept = ": f"accept = {host}:",
        "127.0.0.1:": f"{host}:",
        "/etc/stunnel/tcpupperd.pem": str(certificate),
        "\n[tcpupperd]": "foreground = yes\npid =\n[tcpupperd]",
    }
    file = changed(tmp_path, "stunnel/tcpupperd.conf", changes)
    listen, trusted = [f"proxy={host}:{PROXY}"], ["127.0.0.0/8"]
    with (
        Daemon(listen=listen, proxy_from=trusted, greeting="{client}"),
        running(stunnel, str(file)),
        connected(host, TLS, certificate) as client,
    ):
        port = client.getsockname()[1]
        assert exchange(client) == (f"127.0.0.1:{port}", "HELLO")


def changed(folder: Path, name: str, changes: dict[str, str]) -> Path:
    """An example with some of its text changed, and no address of its own left."""
    text = (EXAMPLES / name).read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    assert "192.0.2." not in text
    text = re.sub(r"\b999(\d)\b", r"2999\1", text)
    file = folder / Path(name).name
    file.write_text(text)
    return file


@contextmanager
def running(*command: str) -> Iterator[None]:
    """A program that runs until the end."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            yield
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(DEADLINE)
            finally:
                process.kill()


@contextmanager
def connected(host: str, port: int, certificate: Path | None = None) -> Iterator[socket.socket]:
    """A client of what has only just started."""

    def connect() -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, port), DEADLINE)
        return None

    with until(connect) as plain:
        if certificate:
            context = ssl.create_default_context(cafile=certificate)
            with context.wrap_socket(plain, server_hostname="localhost") as one:
                yield one
        else:
            yield plain


def ask(host: str, port: int, certificate: Path | None = None) -> tuple[str, str]:
    """The greeting and the answer that a client gets."""
    with connected(host, port, certificate) as client:
        return exchange(client)


def serves_from(host: str) -> set[str]:
    """The servers that some clients get, all of whom are answered."""
    lines = [ask(host, LINES) for _ in range(6)]
    assert {answer for _, answer in lines} == {"HELLO"}
    return {greeting[:8] for greeting, _ in lines}


def exchange(client: socket.socket) -> tuple[str, str]:
    client.sendall(b"hello\n")
    with client.makefile() as answers:
        return answers.readline().rstrip("\n"), answers.readline().rstrip("\n")
