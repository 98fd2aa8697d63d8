"""Memory and descriptors over time, under all kinds of clients simultaneously."""

import random
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from integration.client import Client
from integration.daemon import Daemon
from integration.measures import private_kib, scaled
from integration.processes import descriptors
from integration.talkers import Talkers
from waiting import until

SECONDS = scaled(3.0, 1800.0)
SAMPLES = 40

#: What private memory may grow by, from the second quarter to the last. A short run sees processes
#: that come to own what they shared with each other, and an allocator that has yet to see much.
SOME_KIB = scaled(16384, 1024)

LINES = b"".join(b"line %d of a pipeline\n" % number for number in range(5000))


def pipeline(client: Client) -> None:
    """Pipelined lines."""
    sender = threading.Thread(target=client.send, args=(LINES,))
    sender.start()
    assert client.read(len(LINES)) == LINES.upper()
    sender.join()


def go_away(client: Client) -> None:
    """Reset in the middle of it."""
    client.socket.setblocking(False)
    client.socket.send(LINES[: random.randrange(1, len(LINES))])
    client.reset()


def be_slow(client: Client) -> None:
    """So slow that line_timeout ends it."""
    for _ in range(40):
        client.send(b"x")
        time.sleep(0.1)  # the client's own pace


def never_read(client: Client) -> None:
    """Until write_timeout ends it."""
    while True:
        client.send(LINES)


def write_no_newline(client: Client) -> None:
    sender = threading.Thread(target=client.send, args=(b"x" * 1_000_000,))
    sender.start()
    client.read(900_000)
    sender.join()


KINDS = [pipeline, go_away, be_slow, never_read, write_no_newline]


def test_memory_and_descriptors_stay_flat() -> None:
    timeouts: dict[str, Any] = {"line_timeout": 1, "idle_timeout": 60, "write_timeout": 1}
    with Daemon(workers=2, **timeouts) as daemon, ExitStack() as stack:
        processes = [daemon.pid, *daemon.workers()]
        before = {pid: len(descriptors(pid)) for pid in processes}
        talkers = stack.enter_context(Talkers(daemon.addresses[0], 2))
        stop = threading.Event()
        for kind in KINDS:
            thread = threading.Thread(target=repeat, args=(kind, daemon.addresses[0], stop))
            thread.start()
            stack.callback(thread.join)
        stack.callback(stop.set)  # before they are waited for
        memory = []
        for _ in range(SAMPLES):
            time.sleep(SECONDS / SAMPLES)  # between two samples, while the load continues
            memory.append(private_kib(processes))
        stop.set()
        talkers.stop()
        until(lambda: daemon.counters()["open"] == 0)

        print(f"private KiB: {' '.join(str(one) for one in memory)}; {talkers.answers} answers")
        early, late = (statistics.median(part) for part in (memory[10:20], memory[-10:]))
        assert late <= early + SOME_KIB
        assert [daemon.pid, *daemon.workers()] == processes
        # Some may be in use for a moment, then and now.
        until(lambda: all(len(descriptors(pid)) <= before[pid] for pid in processes))
        assert not talkers.failures
        assert daemon.counters()["bug"] == 0


def repeat(kind: Callable[[Client], None], address: str, stop: threading.Event) -> None:
    while not stop.is_set():
        client = Client(address)
        # A connection that either side closes may end with an error here.
        with suppress(OSError):
            kind(client)
        client.close()
