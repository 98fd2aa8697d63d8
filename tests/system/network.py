"""A client, a load balancer and three servers, each in a network namespace of its own.

The namespaces belong to a container and go with it. Programs of the host can run in them, because
a namespace is a file in the container: /run/netns of ip-netns(8). The load balancer is one of the
container's. The servers have the addresses of the examples.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from system.container import Container
from waiting import DEADLINE

BALANCER = "198.51.100.1"  # as clients see it
UNTIL_WE_END = ("setpriv", "--pdeathsig=KILL")
SERVERS = {name: f"192.0.2.{number}" for number, name in enumerate(("one", "two", "three"), 11)}


class Network:
    """The namespaces: "client", "balancer" and one for each of SERVERS."""

    def __init__(self, machine: Container) -> None:
        self.machine = machine
        for name in ("client", "balancer", *SERVERS):
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        self._join("client", "198.51.100.2", BALANCER)
        for name, address in SERVERS.items():
            self._join(name, address, "192.0.2.1")
        # Ports of closed connections are used again after a second, not a minute.
        for name in ("client", "balancer"):
            self.run(name, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/tcp_tw_reuse")

    def ip(self, *words: str) -> str:
        """ip(8) in the container."""
        return self.machine.run("ip", *words)

    def command(self, name: str, *words: str) -> list[str]:
        """The host's command that runs `words`, also of the host, in a namespace."""
        return ["nsenter", f"--net=/proc/{self.machine.leader}/root/run/netns/{name}", *words]

    def run(self, name: str, *words: str) -> str:
        """What a command of the host writes in a namespace."""
        return subprocess.check_output(self.command(name, *words), text=True, timeout=DEADLINE)

    @contextmanager
    def running(self, name: str, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """A program of the host in a namespace, ended at the end."""
        command = self.command(name, *UNTIL_WE_END, *words)
        with subprocess.Popen(command, text=True, **options) as process:
            try:
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(DEADLINE)
                finally:
                    process.kill()

    @contextmanager
    def balancing(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A program of the container in the balancer's namespace, ended at the end. Its process
        belongs to the host, which can send it signals."""
        inside = ("nsenter", f"--target={self.machine.leader}", "--mount", "--root", "--wd", "--")
        with self.running("balancer", *inside, *UNTIL_WE_END, *words) as process:
            yield process

    def link(self, server: str, state: str) -> None:
        """Set a server's link "up" or "down"."""
        self.ip("-n", server, "link", "set", "uplink", state)

    def set_mtu(self, server: str, size: int) -> None:
        """Set the size of packets on a server's link, in bytes."""
        self.ip("-n", server, "link", "set", "uplink", "mtu", str(size))
        self.ip("-n", "balancer", "link", "set", server, "mtu", str(size))

    @contextmanager
    def losing(self, name: str, *, percent: int) -> Iterator[None]:
        """Drop this percentage of the packets that arrive in a namespace, at random."""
        lose = f"numgen random mod 100 < {percent} drop"
        hook = "{ type filter hook input priority 0; }"
        self.run(name, "nft", "add table inet loss")
        self.run(name, "nft", f"add chain inet loss input {hook}")
        self.run(name, "nft", f"add rule inet loss input iif != lo {lose}")
        try:
            yield
        finally:
            self.run(name, "nft", "delete table inet loss")

    def _join(self, name: str, address: str, balancers_address: str) -> None:
        """Connect a namespace with the balancer's; their ends are "uplink" and its name."""
        peer = ("peer", "name", name, "netns", "balancer")
        self.ip("link", "add", "uplink", "netns", name, "type", "veth", *peer)
        for where, link, own, other in (
            (name, "uplink", address, balancers_address),
            ("balancer", name, balancers_address, address),
        ):
            self.ip("-n", where, "address", "add", own, "peer", other, "dev", link)
            self.ip("-n", where, "link", "set", link, "up")
        self.ip("-n", name, "route", "add", "default", "dev", "uplink", "src", address)
