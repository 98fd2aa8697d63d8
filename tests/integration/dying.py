"""A daemon with something wrong with it: `dying.py FAULT OPTION ...` runs as tcpupperd does.

Faults: "line N": a worker is killed at a random line of its program, after N lines on average;
"poison": a line that contains POISON makes its worker die of a fault in its own program, and one
that contains HANG makes it hang; "alone": no keeper can be started; "full": keepers find the
channel full; "broken": keepers fail.
"""

import ctypes
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from lines import before_line
from tcpupperd import cli
from tcpupperd.processes import connection_format, keeper, worker
from tcpupperd.serving import audit, connection, fast_path, protocol
from tcpupperd.serving.counters import STARTING, STATE, WORKERS_STARTED

PACKAGE = str(Path(cli.__file__).parent)


def die_at_a_line(mean: int) -> None:
    run = worker.run

    def dying(context: worker.WorkerContext) -> None:
        this, numbers = os.getpid(), context.numbers
        is_first = context.scoreboard.daemon[WORKERS_STARTED] <= context.config.worker_count

        def die() -> None:
            if os.getpid() != this:  # its keeper has inherited this function
                return
            if is_first and numbers[STATE] == STARTING:  # the daemon would give up
                return
            os.kill(this, signal.SIGKILL)

        line = int(random.Random().expovariate(1 / mean)) + 1
        before_line(line, lambda path: path.startswith(PACKAGE), die)
        run(context)

    worker.run = dying


def be_poisoned() -> None:
    """Lines are looked at by Python, but received as ever."""
    receive = protocol.LineProtocol.receive

    def poisoned(self: protocol.LineProtocol, data: bytes) -> bytes:
        if b"POISON" in data:
            ctypes.string_at(0)
        while b"HANG" in data:
            time.sleep(1)
        return receive(self, data)

    protocol.LineProtocol.receive = poisoned  # type: ignore[method-assign]
    create = connection.Connection.__init__

    def slowly(self: connection.Connection, *arguments: Any) -> None:
        create(self, *arguments)
        self.protocol.whole_lines = False

    setattr(connection.Connection, "__init__", slowly)  # noqa: B010


def be_alone() -> None:
    def refused(pidfd: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    keeper.sibling = refused


def be_full() -> None:
    settle = keeper.Keeper._settle

    def refused(end: Any, batch: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    def settle_in_vain(self: keeper.Keeper) -> None:
        connection_format.send = refused  # type: ignore[assignment]
        settle(self)

    keeper.GIVE_UP_TIME = 0.1
    keeper.Keeper._settle = settle_in_vain  # type: ignore[method-assign]


def be_broken() -> None:
    def fail(self: audit.Audit, one: Any, *, blame: bool) -> audit.Audited:
        raise ArithmeticError

    audit.Audit.served = fail  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, *options = sys.argv[1:]
    name, _, number = fault.partition(" ")
    assert fast_path
    if name == "line":
        die_at_a_line(int(number))
    elif name == "poison":
        be_poisoned()
    elif name == "alone":
        be_alone()
    elif name == "full":
        be_full()
    elif name == "broken":
        be_broken()
    sys.exit(cli.main(options))
