"""A client with a certificate, which HAProxy terminates TLS for and introduces: its entry in the
journal says who introduced it, and how it came."""

import contextlib
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from entries import LiveEntries
from integration.balancers import HAPROXY, listening, running
from integration.client import endpoint
from integration.daemon import Daemon
from integration.journal import Journal
from tcpupperd.events import Event
from tools import need
from waiting import DEADLINE, until

FRONTEND = """
listen tls
  bind fd@{fd} ssl crt {server} ca-file {client} verify required alpn tcpupperd
  unique-id-format unique-%cp
  server only {address} send-proxy-v2-ssl-cn proxy-v2-options {options}
"""
OPTIONS = "ssl,cert-cn,ssl-cipher,authority,unique-id,crc32c"


class Certificates(NamedTuple):
    """Files with a certificate and its key."""

    server: Path
    client: Path


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    files = Certificates(tmp_path / "server.pem", tmp_path / "client.pem")
    for file, name in zip(files, ("localhost", "Anna Example"), strict=True):
        options = ("-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-days", "2")
        key = tmp_path / "key.pem"
        output = ("-keyout", str(key), "-out", str(file))
        command = (need("openssl"), "req", "-x509", *options, *output)
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        file.write_text(file.read_text() + key.read_text())
    return files


@contextlib.contextmanager
def haproxy(folder: Path, address: str, certificates: Certificates) -> Iterator[str]:
    """HAProxy that demands certificates; its address."""
    program, one = need("haproxy"), listening("127.0.0.1")
    host, port = one.getsockname()
    frontend = FRONTEND.format(
        fd=one.fileno(), address=address, options=OPTIONS, **certificates._asdict()
    )
    file = folder / "haproxy.cfg"
    file.write_text(HAPROXY + frontend)
    with running([program, "-db", "-f", str(file)], [one]):
        yield f"{host}:{port}"


def test_entry_of_a_client_with_a_certificate(
    tmp_path: Path, journal: Journal, certificates: Certificates
) -> None:
    context = ssl.create_default_context(cafile=str(certificates.server))
    context.load_cert_chain(certificates.client)
    context.set_alpn_protocols(["tcpupperd"])
    daemon = Daemon(
        listen=["proxy=127.0.0.1:0"],
        wrapper=journal.wrapper,
        log_connections=True,
        greeting="{tls_cn} by {tls_version} to {authority}",
    )
    with (
        LiveEntries(journal.socket) as entries,
        daemon,
        haproxy(tmp_path, daemon.address_of("proxy"), certificates) as frontend,
    ):
        where = endpoint(frontend)
        with (
            socket.create_connection(where, DEADLINE) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as client,
        ):
            port = client.getsockname()[1]
            client.sendall(b"hello\n")
            version, cipher = client.version(), client.cipher()
            with client.makefile() as answers:
                assert answers.readline() == f"Anna Example by {version} to localhost\n"
                assert answers.readline() == "HELLO\n"
        found = []

        def ended() -> bool:
            found.extend(entries.read())
            wanted = {"MESSAGE_ID": Event.CONNECTION_ENDED.message_id}
            found[:] = [one for one in found if wanted.items() <= one.items()]
            return bool(found)

        until(ended)
    [entry] = found
    assert cipher
    assert {
        "TCPUPPERD_CLIENT": "127.0.0.1",
        "TCPUPPERD_PORT": str(port),
        "TCPUPPERD_BALANCER": "127.0.0.1",
        "TCPUPPERD_DESTINATION": frontend,
        "TCPUPPERD_AUTHORITY": "localhost",
        "TCPUPPERD_UNIQUE_ID": f"unique-{port}",
        "TCPUPPERD_TLS_VERSION": version,
        "TCPUPPERD_TLS_CIPHER": cipher[0],
        "TCPUPPERD_TLS_CN": "Anna Example",
    }.items() <= entry.items()
    print({name: text for name, text in entry.items() if name.startswith("TCPUPPERD_")})
