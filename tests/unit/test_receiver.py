"""What other workers see while one takes connections out of the channel."""

import contextlib
import gc

import pytest

from outlive.channel import Channel
from tcpupperd.config import Config
from tcpupperd.processes import connection_format
from tcpupperd.processes.capacity import capacity
from tcpupperd.processes.connection_format import Connection, send
from tcpupperd.processes.handover import Receiver
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.serving.server import UpperServer
from unit.channels import close, tcp_pairs

GENERATION_7, SHARE = 7, 10


@pytest.mark.parametrize("first", [True, False])
def test_message_is_expected_but_not_open_until_it_is_taken(
    channel: Channel, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Whether this worker is the first to take it or not: a load that it does not have would make
    others take its share, and a message that nobody counts would make them accept too many."""
    board = Scoreboard(1)
    numbers = board.claim(GENERATION_7).numbers
    pairs = tcp_pairs(12)
    clients, served = zip(*pairs, strict=True)
    if first:
        send(channel.send_end, [Connection(one, one.getpeername()) for one in served])
    close(served)
    seen = []
    receive = connection_format.receive

    def look(*arguments: object) -> list[Connection]:
        seen.append((board.loads(), board.open(), board.excess(GENERATION_7, SHARE)))
        return receive(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(connection_format, "receive", look)
    with UpperServer(config=Config(), counters=numbers) as server:
        receiver = Receiver(
            server,
            (channel.send_end, channel.receive_end),
            board,
            capacity(server.config, 1000, kept=True),
        )
        with contextlib.nullcontext() if first else pytest.raises(BlockingIOError):
            receiver._receive(12)
        assert seen == [([0], 0, 2)]
        taken = 12 if first else 0
        assert (board.loads(), board.open()) == ([taken], taken)
        assert board.excess(GENERATION_7, SHARE) == max(0, taken - SHARE)
    close(clients)
    del server, receiver
    gc.collect()  # the two refer to each other
