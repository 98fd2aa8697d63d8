"""The orders that a supervisor gives its workers, each of which makes them exit, and what else it
sends to them and to their keepers."""

from __future__ import annotations

from enum import Enum


class Order(Enum):
    """An order, as it is sent to a worker. End of file, which means that the supervisor has
    exited, is an order too."""

    HAND_OVER = b"g"  # to the other workers
    HAND_OVER_WITH_QUEUES = b"q"  # the same, including those in accept queues that nothing serves
    LEAVE_IN_STORE = b"s"  # leave the connections for the next process: all workers exit
    DRAIN = b"d"  # answer what has arrived, and close the connections


class Verdict(Enum):
    """What the keeper of a worker that is dead has to do. End of file, which means that the
    supervisor has exited, stands for HAND_OVER."""

    HAND_OVER = b"1"  # all that the worker served
    BLAME = b"2"  # the same, but reset the connection that the worker was serving
    SPARE_MEMORY = b"4"  # the same, but reset those of which something has to be kept in memory
    NOTHING = b"3"  # the worker has closed its connections, or had no more time to do so


#: The keeper has died: start another one.
NEW_KEEPER = b"k"

#: What comes with the two ends of a channel, which the worker is to use from now on.
CHANNEL = b"c"
