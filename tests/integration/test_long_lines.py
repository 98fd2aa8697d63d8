"""Lines that are longer than anybody writes."""

import socket
import threading
from collections.abc import Iterator

from integration.client import Client
from integration.daemon import Daemon
from integration.measures import cpu_seconds, private_kib, scaled

#: Every byte value but the newline. Its length shares no factor with that of any buffer.
PATTERN = bytes(byte for byte in range(256) if byte != ord("\n")) * 257

#: About a mebibyte.
BLOCK = PATTERN * 16


def test_line_without_end_is_answered_in_constant_memory() -> None:
    blocks = scaled(256, 4096)
    with Daemon(workers=1) as daemon:
        client, workers = daemon.connect(), daemon.workers()
        before = private_kib(workers)
        memory = [private_kib(workers) for _ in exchange(client, blocks, piece=65536)]
        assert len(memory) == blocks
        growth = max(memory) - before
        print(f"memory grew by {growth} KiB in a line of {blocks} MiB")
        assert growth < 4096  # what stays of 256 MiB or more


def test_line_in_small_pieces_costs_linear_time() -> None:
    blocks = scaled(1, 4)
    # Answered in pieces, and held in memory up to its end.
    for max_line in (65536, 8 * blocks * len(BLOCK)):
        with Daemon(workers=1, max_line=max_line) as daemon:
            once, four_times = (cost(daemon, count) for count in (blocks, 4 * blocks))
            print(f"max_line {max_line}: {blocks} MiB {once:.2f} s, four times {four_times:.2f} s")
            assert four_times < 8 * once


def cost(daemon: Daemon, blocks: int) -> float:
    """The CPU time that it takes the daemon to answer a line in pieces of 16 bytes."""
    client = daemon.connect()
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    before = cpu_seconds(daemon.workers())
    assert sum(1 for _ in exchange(client, blocks, piece=16)) == blocks
    return cpu_seconds(daemon.workers()) - before


def exchange(client: Client, blocks: int, piece: int) -> Iterator[None]:
    """Send one line of so many blocks in pieces of so many bytes, without a newline at its end,
    and check the answer a block at a time."""
    sender = threading.Thread(target=send, args=(client, blocks * len(BLOCK), piece))
    sender.start()
    answer = BLOCK.upper()
    for _ in range(blocks):
        assert client.read(len(BLOCK)) == answer
        yield
    assert client.read_to_end() == b""
    sender.join()


def send(client: Client, size: int, piece: int) -> None:
    twice = memoryview(PATTERN * 2)
    for start in range(0, size, piece):
        begin = start % len(PATTERN)
        client.send(twice[begin : begin + min(piece, size - start)])
    client.end()
