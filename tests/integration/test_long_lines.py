"""Lines that are longer than any person would write."""

import socket
import threading
from collections.abc import Iterator

import pytest

from integration.client import Client
from integration.daemon import Daemon
from integration.measures import cpu_seconds, private_kib, scaled

#: Every byte value but the newline. Its length shares no factor with that of any buffer.
PATTERN = bytes(byte for byte in range(256) if byte != ord("\n")) * 257

#: About a mebibyte, of one line without end and of many.
BLOCK = PATTERN * 16
LINES = b"fifteen letters\n" * (len(BLOCK) // 16)


def test_line_without_end_is_answered_in_constant_memory() -> None:
    blocks = scaled(64, 4096)
    with Daemon(workers=1) as daemon:
        client, workers = daemon.connect(), daemon.workers()
        before = private_kib(workers)
        memory = [private_kib(workers) for _ in exchange(client, blocks, BLOCK, piece=65536)]
        assert len(memory) == blocks
        growth = max(memory) - before
        print(f"memory grew by {growth} KiB in a line of {blocks} MiB")
        assert growth < 4096  # what stays of 64 MiB or more


@pytest.mark.parametrize("held", [False, True])
def test_line_in_small_pieces_costs_no_more_than_lines_of_that_size(held: bool) -> None:
    """Whether it is answered in pieces, or held in memory up to its end."""
    blocks = scaled(1, 16)
    with Daemon(workers=1, max_line=2 * blocks * len(BLOCK) if held else 65536) as daemon:
        one_line = cost(daemon, blocks, BLOCK)
        short_lines = cost(daemon, blocks, LINES)
    print(f"{blocks} MiB in 16-byte pieces: {one_line:.2f} s, in lines {short_lines:.2f} s")
    assert one_line < 5 * short_lines


def cost(daemon: Daemon, blocks: int, block: bytes) -> float:
    """The CPU time that the daemon needs to answer this many blocks in pieces of 16 bytes."""
    client = daemon.connect()
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Few pieces are in flight at a time, so the daemon does not receive thousands together.
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    before = cpu_seconds(daemon.workers())
    assert sum(1 for _ in exchange(client, blocks, block, piece=16)) == blocks
    return cpu_seconds(daemon.workers()) - before


def exchange(client: Client, blocks: int, block: bytes, piece: int) -> Iterator[None]:
    """Send a block this many times in pieces of this many bytes, and check the answer block by
    block."""
    sender = threading.Thread(target=send, args=(client, blocks * len(block), block, piece))
    sender.start()
    answer = block.upper()
    for _ in range(blocks):
        assert client.read(len(block)) == answer
        yield
    assert client.read_to_end() == b""
    sender.join()


def send(client: Client, size: int, block: bytes, piece: int) -> None:
    twice = memoryview(block * 2)
    for start in range(0, size, piece):
        begin = start % len(block)
        client.send(twice[begin : begin + min(piece, size - start)])
    client.end()
