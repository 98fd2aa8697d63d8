"""The orders that a supervisor gives its workers, each of which makes them exit, and what else it
sends them."""

from __future__ import annotations

from enum import Enum


class Order(Enum):
    """An order, as it is sent to a worker. End of file, which means that the supervisor has
    exited, is an order too."""

    HAND_OVER = b"g"  # to the other workers
    HAND_OVER_WITH_QUEUES = b"q"  # the same, including those in accept queues that nothing serves
    LEAVE_IN_STORE = b"s"  # leave the connections for the next process: all workers exit
    DRAIN = b"d"  # answer what has arrived, and close the connections


#: What comes with the two ends of a channel, which the worker is to use from now on.
CHANNEL = b"c"
