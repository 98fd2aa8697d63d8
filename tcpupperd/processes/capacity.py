"""How many connections a worker may have, and which limit says so."""

from __future__ import annotations

from typing import NamedTuple

from tcpupperd.config import Config
from tcpupperd.processes import handover

#: Descriptors that a worker needs besides its connections.
RESERVE = 64


class Capacity(NamedTuple):
    """What the settings and a limit of descriptors allow, in connections."""

    accepted: int  # by one worker: with so many open it accepts no more
    descriptors: int  # with so many open, one worker has room for another message
    together: int  # of all workers: what the next process can be handed
    batch: int  # in one message
    messages: int  # all that may be on their way at a time
    limit: int  # RLIMIT_NOFILE, which the figures follow from
    kept: bool  # whether connections are kept at a restart
    scarce: bool  # whether all workers need to keep an eye on what they have `together`

    def complaint(self, config: Config) -> str:
        """Which limit binds in place of max_connections; "" if none does."""
        if self.accepted >= config.max_connections:
            return ""
        why = "so many can be handed over" if self.kept else "a worker has room for so many"
        return (
            f"max_connections is {config.max_connections}, but each of {config.worker_count}"
            f" workers accepts no more than {self.accepted} connections: {why} with a limit of"
            f" {self.limit} descriptors (RLIMIT_NOFILE, LimitNOFILE= of a unit)"
        )


def capacity(config: Config, limit: int, *, kept: bool) -> Capacity:
    """What is allowed where RLIMIT_NOFILE is `limit`; `kept`, if a restart keeps connections.

    The kernel lets a user have as many descriptors in flight as a process of his may have open
    (ETOOMANYREFS of unix(7)). At a restart the connections of all workers are, and a memfd for
    each message.
    """
    workers = config.worker_count
    batch = min(handover.BATCH, max(1, limit // 4))
    descriptors = max(1, limit - batch - min(RESERVE, limit // 4))
    messages = limit // 16
    together = max(workers, limit - messages - workers) if kept else workers * descriptors
    accepted = min(config.max_connections, descriptors, together // workers)
    # In a reload there are twice as many workers. A limit that is farther away than that is not
    # worth a look in every turn.
    scarce = together < 4 * workers * accepted
    return Capacity(accepted, descriptors, together, batch, messages, limit, kept, scarce)
