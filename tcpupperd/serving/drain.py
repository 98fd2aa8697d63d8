"""How a server ends without losing an answer.

No connection begins any more, those in the queues are taken, what has been received is answered,
and each connection ends as soon as its answers have left; after `drain_timeout`, all do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tcpupperd.serving.counters import CUT
from tcpupperd.serving.handler import UpperHandler

if TYPE_CHECKING:
    from tcpupperd.serving.server import UpperServer

#: Seconds that are left to handshakes under way. They take a round trip, unless a segment is lost:
#: it is sent again after a second, and once more two seconds later.
HANDSHAKE_TIME = 3.5

#: Seconds between two looks whether any still are: nothing tells when they end.
HANDSHAKE_TICK = 0.02


class Drain:
    """The end of one server; `go_on` is to be called once a turn.

    With `take_queues` those are served too that wait in the queues of the listeners; not, if
    somebody else holds the listeners and will serve them.
    """

    def __init__(self, server: UpperServer, *, take_queues: bool) -> None:
        self._server = server
        self._give_up_at = server.now + server.config.drain_timeout
        self._last_call_at = min(server.now + HANDSHAKE_TIME, self._give_up_at)
        self._newcomers = server.connections()  # who has yet to speak, as far as we know
        if take_queues:
            server.acceptor.refuse()
        else:
            server.acceptor.stop()

    def go_on(self) -> None:
        """Take what still comes, and end what can be ended."""
        if self._server.acceptor.listeners:
            self._take_queues()
        for handler in self._newcomers:
            self._server.attempt(UpperHandler.drain, handler)
        self._newcomers = [
            one for one in self._newcomers if one.is_new and one.request.fileno() >= 0
        ]
        if self._server.now >= self._give_up_at:
            self._give_up()

    @property
    def more_may_begin(self) -> bool:
        """Whether somebody may yet come, or speak for the first time."""
        return bool(self._server.acceptor.listeners or self._newcomers)

    @property
    def next_look(self) -> float:
        """When `go_on` is to be called at the latest, though nothing happens."""
        soon = self._server.now + HANDSHAKE_TICK if self.more_may_begin else math.inf
        return min(soon, self._give_up_at)

    def _take_queues(self) -> None:
        acceptor = self._server.acceptor
        last = self._server.now >= self._last_call_at or not acceptor.expects_more
        acceptor.take_queues()
        self._newcomers = self._server.connections()
        if last:
            acceptor.stop()

    def _give_up(self) -> None:
        """Close what could not be drained in time."""
        self._give_up_at = math.inf
        for handler in self._server.connections():
            if handler.unsent:
                self._server.counters[CUT] += 1
                self._server.cut_connection(handler)
            else:
                self._server.close_connection(handler)
