"""The services that a listener can provide: each creates the protocol for a client."""

from __future__ import annotations

import socket
import typing
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from tcpupperd.address import AGENT, LAB, LAB_PROXY, METRICS, PROXY, UPPER
from tcpupperd.config import Config
from tcpupperd.host.sockets import Listener
from tcpupperd.serving.agent import AgentProtocol
from tcpupperd.serving.connection import Connection
from tcpupperd.serving.connection_log import about
from tcpupperd.serving.connections import Connections
from tcpupperd.serving.counters import REQUESTS_AGENT, REQUESTS_METRICS, Tally
from tcpupperd.serving.greeting import Greeting
from tcpupperd.serving.health import live, ready
from tcpupperd.serving.http import HttpProtocol, Page
from tcpupperd.serving.introduction import NOBODY, Introduction
from tcpupperd.serving.lab import LabProtocol
from tcpupperd.serving.metrics import page as metrics_page
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol, Protocol
from tcpupperd.serving.proxy_clients import ProxyClients
from tcpupperd.serving.report import Report
from tcpupperd.serving.status import page as status_page


class ServiceContext(typing.Protocol):
    """What a service may use of its server."""

    config: Config
    instance: str  # the name of the configuration
    connections: Connections
    tally: Tally

    def refusal(self, request: socket.socket, client_address: Any) -> int | None:
        """Why not to serve a client: a counter, which has counted it; None if it is served."""

    def is_stopping_soon(self) -> bool:
        """Whether new clients should go elsewhere."""

    def report(self) -> Report:
        """The state of the daemon."""


class Service(NamedTuple):
    """What a listener provides."""

    protocol: Callable[[object], Protocol]
    """Creates the protocol for a new connection, with what it sends first; called with the
    address of the client."""

    refusal: Callable[[socket.socket, object], int | None]
    """Why not to serve a new connection: a counter, which has counted it; None if it is served.
    Called with the socket and the address of the client."""


class ClientProtocol(typing.Protocol):
    """Creates the protocol for a client, about whom a load balancer may have said something."""

    def __call__(self, client_address: object, introduction: Introduction = NOBODY) -> Protocol:
        """The protocol for a client at this address."""


def services(server: ServiceContext, listeners: Iterable[Listener]) -> dict[str, Service]:
    """The services by the name of the listener: FileDescriptorName= in systemd.socket(5). An
    unknown name stands for `upper`, because systemd names descriptors after the socket unit by
    default."""
    config, pages, refusal = server.config, _pages(server.report), server.refusal
    greeting = Greeting.of(config, server.instance)

    def upper(client_address: object, introduction: Introduction = NOBODY) -> Protocol:
        """Answers in upper case, with the configured framing."""
        opening = greeting.line(client_address, introduction) if greeting else b""
        if config.framing == "none":
            return ChunkProtocol(config.lines_per_connection, opening)
        return LineProtocol(config.max_line, config.lines_per_connection, opening)

    def agent(client_address: object) -> Protocol:
        """Tells load balancers whether to send new clients."""
        return AgentProtocol(leaving=server.is_stopping_soon())

    def metrics(client_address: object) -> Protocol:
        """Tells Prometheus, probes and people what the daemon is doing."""
        return HttpProtocol(pages)

    lab = lab_of(server)
    default = Service(upper, refusal)
    return dict.fromkeys((listener.name for listener in listeners), default) | {
        UPPER: default,
        PROXY: behind_proxy(server, PROXY, upper),
        AGENT: Service(agent, refusal),
        METRICS: Service(metrics, refusal),
        LAB: Service(lab, refusal),
        LAB_PROXY: behind_proxy(server, LAB_PROXY, lab),
    }


def behind_proxy(server: ServiceContext, name: str, protocol: ClientProtocol) -> Service:
    """The service with this name, whose clients load balancers identify."""
    clients = ProxyClients(
        server.connections, server.tally, server.refusal, protocol, server.config.proxy_from
    )
    return Service(partial(clients.protocol, name), clients.refusal)


def lab_of(server: ServiceContext) -> ClientProtocol:
    """Creates the protocol that misbehaves as its client asks."""
    host = socket.gethostname()

    def who(connection: Connection, now: float) -> dict[str, object]:
        """Where a connection ended up, and what the journal says about it, in lower case."""
        fields = {
            name.removeprefix("TCPUPPERD_").lower(): value
            for name, value in about(connection, now).items()
            if value != ""
        }
        return {"host": host, "instance": server.instance, **fields}

    return lambda client_address, introduction=NOBODY: LabProtocol(who)


def _pages(report: Callable[[], Report]) -> dict[bytes, Callable[[], Page]]:
    """What the service `metrics` answers, by path."""
    return {
        b"/": lambda: status_page(report()),
        b"/metrics": lambda: metrics_page(report()),
        b"/ready": lambda: ready(report()),
        b"/live": live,
    }


#: The services for administrators and load balancers, who must get through while clients wait, and
#: the counters of their connections.
PRIVILEGED = {AGENT: REQUESTS_AGENT, METRICS: REQUESTS_METRICS}
