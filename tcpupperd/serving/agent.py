"""The agent, which tells load balancers whether to send new clients: sans I/O.

It speaks the protocol of HAProxy's option agent-check: it sends a line as soon as the balancer has
connected. It never sends "ready", "drain" or "maint": those change the administrative state, so
each check would undo what an administrator has set. A weight has no other effect; at weight 0, a
server keeps its connections and is sent no new ones.
"""

from __future__ import annotations

from tcpupperd.serving.protocol import Protocol


class AgentProtocol(Protocol):
    """Sends its answer without waiting for input, and ignores input (agent-send in HAProxy)."""

    __slots__ = ()

    service = "agent"
    is_privileged = True

    def __init__(self, *, leaving: bool) -> None:
        # "up" as well: nothing else undoes the "down" of another agent on the same address.
        super().__init__(b"up 0%\n" if leaving else b"up 100%\n")
        self.finished = True  # as soon as the opening has been sent
