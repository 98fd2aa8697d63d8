"""The agent, which tells load balancers whether new clients are welcome: sans I/O.

It speaks the protocol of HAProxy's option agent-check: a line as soon as the balancer has
connected. It never says "ready", "drain" or "maint": those change the administrative state, so
each check would undo what an administrator has set. A weight changes nothing else, and with a
weight of 0, a server keeps its connections and gets no new ones.
"""

from __future__ import annotations


class AgentProtocol:
    """Has the answer before any input, and ignores that (agent-send of HAProxy)."""

    __slots__ = ("opening",)

    service = "agent"
    introduces = False
    held = b""
    lines = 0
    mid_line = False
    whole_lines = False
    finished = True  # once the opening is sent

    def __init__(self, *, leaving: bool) -> None:
        # "up" as well, because it alone undoes a "down" of another agent in our place.
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
