"""Clients that reset at a random point."""

import random
from contextlib import suppress

from integration.client import Client
from integration.daemon import Daemon
from integration.measures import scaled
from integration.processes import descriptors
from waiting import until

CONNECTIONS = scaled(2_000, 50_000)
LINES = b"a line of many\n" * 20_000


def connect_only(client: Client, _: random.Random) -> None:
    """Reset when the connection stands; it may not even be accepted yet."""


def send_a_part(client: Client, chance: random.Random) -> None:
    client.send(LINES[: chance.randrange(1, 100)])


def leave_answers_unread(client: Client, chance: random.Random) -> None:
    client.send(LINES[: chance.randrange(100, 2000)])
    client.socket.recv(chance.randrange(1, 100))


def send_all_that_goes(client: Client, chance: random.Random) -> None:
    """The daemon is sending, and is waiting to send more."""
    client.socket.setblocking(False)
    client.socket.send(LINES[: chance.randrange(1, len(LINES))])


def half_close(client: Client, chance: random.Random) -> None:
    client.send(LINES[: chance.randrange(1, 2000)])
    client.end()


def leave_end_unanswered(client: Client, chance: random.Random) -> None:
    """More lines than are answered: the daemon has closed its side and is waiting for the
    client's."""
    client.send(LINES[: chance.randrange(1000, 2000)])
    client.socket.recv(chance.randrange(1, 20))


POINTS = [
    connect_only,
    send_a_part,
    leave_answers_unread,
    send_all_that_goes,
    half_close,
    leave_end_unanswered,
]


def test_resets_at_random_points_leave_nothing() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    # A limit of lines, so that the daemon ends some connections itself.
    with Daemon(workers=2, lines_per_connection=10, max_connections_per_source=500) as daemon:
        workers, log = daemon.workers(), daemon.log
        before = [len(descriptors(pid)) for pid in workers]
        for _ in range(CONNECTIONS):
            client = Client(daemon.addresses[0])
            with suppress(OSError):  # the daemon has ended it
                chance.choice(POINTS)(client, chance)
            client.reset()
        until(lambda: daemon.counters()["accepted"] >= CONNECTIONS * 0.9)
        until(lambda: daemon.counters()["open"] == 0)
        assert daemon.workers() == workers
        until(lambda: [len(descriptors(pid)) for pid in workers] == before)
        said = daemon.log.removeprefix(log).splitlines()
        assert all("counters: " in line for line in said)
        assert daemon.counters()["bug"] == 0
