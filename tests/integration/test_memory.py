"""The memory that is the daemon's alone: what it would give back if it ended (proc(5), smaps)."""

from integration.daemon import Daemon
from integration.measures import private_kib


def test_worker_shares_most_memory_with_its_supervisor() -> None:
    with Daemon(workers=1) as daemon:
        serve(daemon, 1)
        worker, supervisor = private_kib(daemon.workers()), private_kib([daemon.pid])
        print(f"private: worker {worker} KiB, supervisor {supervisor} KiB")
        assert worker - supervisor < 4096


def test_idle_connection_takes_little_memory() -> None:
    count = 800  # with those before, below the usual limit of descriptors
    with Daemon(workers=1) as daemon:
        processes = [daemon.pid, *daemon.workers()]
        serve(daemon, 100)  # what is made once for all is there after these
        before = private_kib(processes)
        serve(daemon, count)
        each = (private_kib(processes) - before) * 1024 / count
        print(f"private: {each:.0f} bytes a connection")
        # Of 10,000 one takes 1 KiB at most (see the benchmarks); of fewer, tables that have just
        # grown make it more. A buffer for each would break this.
        assert each < 1280


def serve(daemon: Daemon, count: int) -> None:
    """Have a line answered on each of this many connections, which stay open."""
    for _ in range(count):
        assert daemon.connect().ask(b"hello") == b"HELLO"
