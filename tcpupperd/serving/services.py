"""The services that a listener can provide: each creates the protocol for a client."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import NamedTuple

from tcpupperd.config import Config
from tcpupperd.serving.agent import AgentProtocol
from tcpupperd.serving.connections import Connections
from tcpupperd.serving.counters import Tally
from tcpupperd.serving.greeting import Greeting
from tcpupperd.serving.http import HttpProtocol
from tcpupperd.serving.metrics import page as metrics_page
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol, Protocol
from tcpupperd.serving.proxy_clients import ProxyClients
from tcpupperd.serving.report import Report
from tcpupperd.serving.status import page as status_page


class ServiceContext(NamedTuple):
    """What a service may use of its server."""

    config: Config
    instance: str  # the name of the configuration
    connections: Connections
    tally: Tally
    verify: Callable[[socket.socket, object], bool]  # whether a client may be served
    is_leaving: Callable[[], bool]  # whether new clients should go elsewhere
    report: Callable[[], Report]


class Service(NamedTuple):
    """What a listener provides."""

    protocol: Callable[[object], Protocol]
    """Creates the protocol for a new connection, with what it sends first; called with the
    address of the client."""

    admits: Callable[[socket.socket, object], bool]
    """Whether to serve a new connection; called with the socket and the address of the client."""


def services(context: ServiceContext) -> dict[str, Service]:
    """The services by the name of the listener: FileDescriptorName= in systemd.socket(5)."""
    config, report, verify = context.config, context.report, context.verify
    greeting = Greeting.of(config, context.instance)
    pages = {b"/": lambda: status_page(report()), b"/metrics": lambda: metrics_page(report())}

    def upper(client_address: object) -> Protocol:
        """Answers in upper case, with the configured framing."""
        opening = greeting.line(client_address) if greeting else b""
        if config.framing == "none":
            return ChunkProtocol(config.lines_per_connection, opening)
        return LineProtocol(config.max_line, config.lines_per_connection, opening)

    def agent(client_address: object) -> Protocol:
        """Tells load balancers whether to send new clients."""
        return AgentProtocol(leaving=context.is_leaving())

    def metrics(client_address: object) -> Protocol:
        """Tells Prometheus and people what the daemon is doing."""
        return HttpProtocol(pages)

    proxy = ProxyClients(config.proxy_from, context.connections, context.tally, verify, upper)
    return {
        "upper": Service(upper, verify),
        "proxy": Service(proxy.protocol, proxy.admits),
        "agent": Service(agent, verify),
        "metrics": Service(metrics, verify),
    }


#: The services for administrators and load balancers, who must get through while clients wait.
PRIVILEGED = {"agent", "metrics"}
