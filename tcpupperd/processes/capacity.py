"""The number of connections that a worker may have, derived from a limit on descriptors."""

from __future__ import annotations

from typing import NamedTuple

from outlive.channel import BATCH
from tcpupperd.config import Config
from tcpupperd.serving.acceptor import PRIVILEGED_EXTRA
from tcpupperd.words import counted

#: Descriptors that a worker needs in addition to those of its connections.
RESERVE = 64


class Capacity(NamedTuple):
    """The connections that the settings and a limit on descriptors allow."""

    accepted: int  # by one worker: at this number, it stops accepting
    descriptors: int  # in one worker: below this number, it has room for another full message
    room: int  # in one worker: the most that it may have after taking over a message
    total_connections: int  # in all workers: as many as can be handed over to the next process
    batch: int  # in one message
    messages: int  # that may be in flight at a time
    limit: int  # RLIMIT_NOFILE, from which these numbers are derived
    restart_keeps_connections: bool
    one_generation_accepts: bool  # whether two must not accept at the same time

    def problem(self, config: Config) -> str:
        """A message if a limit lower than max_connections applies; "" otherwise."""
        if self.accepted >= config.max_connections:
            return ""
        why = "there is no room for more"
        if self.restart_keeps_connections:
            why = "a restart could not hand over more"
        return (
            f"max_connections is {config.max_connections}, but each worker will accept at most"
            f" {self.accepted} connections: with {counted(config.worker_count, 'worker')} and a"
            f" limit of {self.limit} descriptors (RLIMIT_NOFILE; LimitNOFILE= in the unit), {why}"
        )


def capacity(config: Config, limit: int, *, kept: bool) -> Capacity:
    """The connections allowed if RLIMIT_NOFILE is `limit`; `kept` if a restart keeps connections.

    A user may have as many descriptors in flight as one process may have open (ETOOMANYREFS in
    unix(7)). During a restart, the descriptors in flight are the connections of all workers,
    including those accepted beyond their capacity, and a memfd per message.
    """
    workers = config.worker_count
    batch = min(BATCH, max(1, limit // 4))
    descriptors = max(1, limit - batch - min(RESERVE, limit // 4))
    room = max(1, limit - min(RESERVE, max(16, limit // 8)))
    messages = limit // 16
    in_flight = max(workers, limit - messages - workers * (1 + PRIVILEGED_EXTRA))
    total = in_flight if kept else workers * descriptors
    accepted = min(config.max_connections, descriptors, total // workers)
    # During a reload, there are twice as many workers, and perhaps those of an earlier reload.
    one_at_a_time = total < 4 * workers * accepted
    return Capacity(
        accepted, descriptors, room, total, batch, messages, limit, kept, one_at_a_time
    )
