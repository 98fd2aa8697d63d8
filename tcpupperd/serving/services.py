"""The services that a listener can provide: a table indexed by the name of the listener."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tcpupperd.config import Config
from tcpupperd.serving.agent import AgentProtocol
from tcpupperd.serving.http import HttpProtocol
from tcpupperd.serving.metrics import page as metrics_page
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol, Protocol
from tcpupperd.serving.proxy import HeaderProtocol
from tcpupperd.serving.report import Report
from tcpupperd.serving.status import page as status_page


class Situation(NamedTuple):
    """What a service may know about the server."""

    config: Config
    is_leaving: Callable[
        [], bool
    ]  # whether it is about to stop, so that new clients should go elsewhere
    report: Callable[[], Report]


#: Creates the protocol of a new connection.
Service = Callable[[Situation], Protocol]


def upper(situation: Situation) -> Protocol:
    """Answers in upper case, with the configured framing."""
    config = situation.config
    if config.framing == "none":
        return ChunkProtocol(config.lines_per_connection)
    return LineProtocol(config.max_line, config.lines_per_connection)


def proxy(situation: Situation) -> Protocol:
    """Receives a PROXY header, after which the service `upper` takes over the connection."""
    return HeaderProtocol()


def agent(situation: Situation) -> Protocol:
    """Tells load balancers whether to send new clients."""
    return AgentProtocol(leaving=situation.is_leaving())


def metrics(situation: Situation) -> Protocol:
    """Tells Prometheus and people what the daemon is doing."""
    return HttpProtocol(
        {
            b"/": lambda: status_page(situation.report()),
            b"/metrics": lambda: metrics_page(situation.report()),
        }
    )


#: The services by the name of the listener: FileDescriptorName= in systemd.socket(5).
SERVICES: dict[str, Service] = {
    "upper": upper,
    "proxy": proxy,
    "agent": agent,
    "metrics": metrics,
}

#: The services for administrators and load balancers, who must get through while clients wait.
PRIVILEGED = {"agent", "metrics"}


def service_of(name: str) -> Service:
    """The service of a listener with this name. It is `upper` for any unknown name, because
    systemd names descriptors after the socket unit by default."""
    return SERVICES.get(name, upper)
