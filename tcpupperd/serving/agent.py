"""The agent, which tells load balancers whether to send new clients: sans I/O.

It speaks the protocol of HAProxy's option agent-check: it sends a line as soon as the balancer has
connected. It never sends "ready", "drain" or "maint": those change the administrative state, so
each check would undo what an administrator has set. A weight has no other effect; at weight 0, a
server keeps its connections and is sent no new ones.
"""

from __future__ import annotations


class AgentProtocol:
    """Sends its answer without waiting for input, and ignores input (agent-send in HAProxy)."""

    __slots__ = ("opening",)

    service = "agent"
    introduces = False
    held = b""
    lines = 0
    mid_line = False
    whole_lines = False
    finished = True  # as soon as the opening has been sent

    def __init__(self, *, leaving: bool) -> None:
        # "up" as well: nothing else undoes the "down" of another agent on the same address.
        self.opening = b"up 0%\n" if leaving else b"up 100%\n"

    def receive(self, data: bytes) -> bytes:
        """Nothing."""
        return b""

    def receive_eof(self) -> bytes:
        """Nothing."""
        return b""

    def finish(self) -> None:
        """There is nothing to finish."""

    def resume(self, lines: int, mid_line: bool, held: bytes) -> bytes:
        """Nothing: nothing is held."""
        return b""
