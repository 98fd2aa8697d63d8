"""Three servers, each stopped and started again, behind a load balancer that learns from `/ready`
or from its administrator that they are leaving. Clients are at work all the time: see
tests/load/exchanges.py."""

import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from haproxy import HAProxy
from integration.balancers import listening, running
from integration.daemon import Daemon
from load import exchanges
from load.exchanges import CLIENTS, Exchanges
from tools import need
from waiting import DEADLINE, until

UPPER, METRICS = 29999, 29998

#: Seconds: more than two health checks.
DELAY = 5

FRONTEND = """
global
  stats socket {folder}/admin.sock
defaults
  mode tcp
  timeout connect 10s
  timeout client 60s
  timeout server 60s
  timeout check 60s
  retries 3
  option redispatch
listen tcpupperd
  bind fd@{fd}
  balance roundrobin
  option httpchk GET /ready
  default-server check port {metrics} inter 500ms fall 2 rise 1
"""

NGINX = """
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
pid {folder}/nginx.pid;
events {{ }}
stream {{
  upstream servers {{ {servers} }}
  server {{ listen {listen}; proxy_pass servers; proxy_half_close on; }}
}}
"""


class Servers:
    """Three servers at addresses of their own."""

    def __init__(self) -> None:
        self.network = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
        self.hosts = {name: f"{self.network}.{at}" for at, name in enumerate(HAProxy.SERVERS, 11)}
        self.daemons: dict[str, Daemon] = {}
        self._stack = contextlib.ExitStack()

    def start(self, name: str) -> None:
        host = self.hosts[name]
        listen = [f"{host}:{UPPER}", f"metrics={host}:{METRICS}"]
        daemon = Daemon(listen=listen, workers=1, shutdown_delay=DELAY)
        self.daemons[name] = self._stack.enter_context(daemon)

    def stop(self, name: str) -> None:
        self.daemons[name].send_signal(signal.SIGTERM)
        assert self.daemons[name].wait() == 0

    def close(self) -> None:
        for daemon in self.daemons.values():
            daemon.reload(shutdown_delay=0)
        self._stack.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    servers = Servers()
    for name in servers.hosts:
        servers.start(name)
    yield servers
    servers.close()


def roll(
    servers: Servers,
    where: tuple[str, int],
    before: Callable[[str], object],
    after: Callable[[str], object],
) -> None:
    """Stop and start each server while clients are at work."""
    words = (sys.executable, exchanges.__file__, where[0], str(where[1]))
    with subprocess.Popen(words, stdin=PIPE, stdout=PIPE, text=True) as process:
        clients = Exchanges(process)
        clients.go_on()
        for name in HAProxy.SERVERS:
            before(name)
            servers.stop(name)
            clients.go_on()
            servers.start(name)
            after(name)
            clients.go_on()
        report = clients.finish()
    print(report)
    assert report.faults == {}
    assert report.ended <= len(HAProxy.SERVERS) * CLIENTS


def test_haproxy_that_asks_whether_servers_are_ready(tmp_path: Path, servers: Servers) -> None:
    program, one = need("haproxy"), listening("127.0.0.1")
    text = FRONTEND.format(folder=tmp_path, fd=one.fileno(), metrics=METRICS)
    rows = (f"  server {name} {host}:{UPPER}\n" for name, host in servers.hosts.items())
    file = tmp_path / "haproxy.cfg"
    file.write_text(text + "".join(rows))
    where = one.getsockname()
    with running([program, "-db", "-f", str(file)], [one]):
        balancer = HAProxy(tmp_path / "admin.sock")

        def is_up(name: str) -> None:
            until(lambda: balancer.check("tcpupperd", name) == "L7OK")

        for name in servers.hosts:
            is_up(name)
        roll(servers, where, before=lambda name: None, after=is_up)


def test_nginx_whose_administrator_marks_servers_down(tmp_path: Path, servers: Servers) -> None:
    """nginx has no health checks, so the administrator tells it."""
    where = f"{servers.network}.10", UPPER
    file = tmp_path / "nginx.conf"

    def write(down: str = "") -> None:
        rows = (
            f"server {host}:{UPPER}{' down' * (name == down)};"
            for name, host in servers.hosts.items()
        )
        listen = f"{where[0]}:{where[1]}"
        file.write_text(NGINX.format(folder=tmp_path, servers=" ".join(rows), listen=listen))

    write()
    command = [need("nginx"), "-e", "stderr", "-c", str(file)]
    with subprocess.Popen(command) as nginx:

        def workers() -> set[str]:
            return set(Path(f"/proc/{nginx.pid}/task/{nginx.pid}/children").read_text().split())

        def mark(name: str) -> None:
            old = until(workers)
            write(down=name)
            nginx.send_signal(signal.SIGHUP)
            until(lambda: workers() - old)

        try:
            until(lambda: (tmp_path / "nginx.pid").exists() and workers())
            roll(servers, where, before=mark, after=lambda name: mark(""))
        finally:
            nginx.terminate()
            nginx.wait(DEADLINE)
