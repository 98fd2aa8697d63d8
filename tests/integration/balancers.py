"""Real load balancers in front of a daemon, as ordinary processes."""

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from integration.client import name_of
from tools import need
from waiting import DEADLINE

HAPROXY = """\
defaults
  mode tcp
  timeout connect 10m
  timeout client 10m
  timeout server 10m
"""

#: A frontend, whose socket is inherited, and its only server.
HAPROXY_LISTEN = """
listen {name}
  bind fd@{fd}
  unique-id-format %{{+X}}o\\ %ci:%cp
  server only {address} {options}
"""

NGINX = """\
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
error_log stderr;
pid {directory}/nginx.pid;
events {{ }}
stream {{
  proxy_protocol on;
  proxy_half_close on;
  server {{ listen {port}; proxy_pass {address}; }}
}}
"""


@contextmanager
def haproxy(
    directory: Path, address: str, options: Mapping[str, str], host: str = "127.0.0.1"
) -> Iterator[dict[str, str]]:
    """HAProxy with a frontend for each of some options of the keyword `server`; the address of
    each frontend."""
    program = need("haproxy")
    sockets = {name: listening(host) for name in options}
    frontends = [
        HAPROXY_LISTEN.format(name=name, fd=one.fileno(), address=address, options=options[name])
        for name, one in sockets.items()
    ]
    path = directory / "haproxy.cfg"
    path.write_text(HAPROXY + "".join(frontends))
    addresses = {name: name_of(one) for name, one in sockets.items()}
    with running([program, "-db", "-f", str(path)], list(sockets.values())):
        yield addresses


@contextmanager
def nginx(directory: Path, address: str, host: str = "127.0.0.1") -> Iterator[str]:
    """nginx with its module stream, which sends headers of version 1; its address."""
    program = need("nginx")
    one = listening(host)
    path = directory / "nginx.conf"
    where = name_of(one)
    path.write_text(NGINX.format(directory=directory, port=where, address=address))
    # How it gets the sockets of the process that it replaces.
    environment = os.environ | {"NGINX": f"{one.fileno()};"}
    with running([program, "-e", "stderr", "-c", str(path)], [one], environment):
        yield where


def listening(host: str) -> socket.socket:
    """A socket at any port. Clients can connect before the balancer has started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)


@contextmanager
def running(
    command: Sequence[str],
    sockets: Sequence[socket.socket],
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """A context manager that runs a program that inherits some sockets, and is then the only one
    to have them."""
    process = subprocess.Popen(
        command, pass_fds=[one.fileno() for one in sockets], env=environment
    )
    for one in sockets:
        one.close()
    try:
        yield
        assert process.poll() is None, f"{command[0]} has ended"
    finally:
        process.terminate()
        process.wait(DEADLINE)
