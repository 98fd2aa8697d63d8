"""`max_connections` and `max_connections_per_source`, at the limit and one above."""

import socket
import time
from pathlib import Path

from integration.client import endpoint
from integration.daemon import Daemon
from integration.measures import scaled
from integration.processes import stopped
from waiting import DEADLINE, until

#: Seconds between warnings that clients can cause.
QUIET = 10


def test_one_above_max_connections_waits() -> None:
    with Daemon(workers=1, max_connections=5) as daemon:
        served = [daemon.connect() for _ in range(5)]
        assert [client.ask(b"one") for client in served] == [b"ONE"] * 5
        sixth = daemon.connect()
        sixth.send(b"six\n")
        assert [client.ask(b"more") for client in served] == [b"MORE"] * 5
        assert daemon.counters()["accepted"] == 5
        served.pop().close()
        assert sixth.read_line() == b"SIX\n"


def test_worker_at_max_connections_leaves_new_ones_to_another() -> None:
    with Daemon(workers=2, max_connections=5) as daemon:
        clients = [daemon.connect() for _ in range(10)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 10


def test_one_above_the_limit_of_its_source_is_refused() -> None:
    with Daemon(workers=1, max_connections_per_source=5) as daemon:
        served = [daemon.connect() for _ in range(5)]
        assert [client.ask(b"one") for client in served] == [b"ONE"] * 5
        refused = scaled(100, 5000)
        for _ in range(refused):
            assert daemon.connect().read_to_end() == b""
        assert [client.ask(b"more") for client in served] == [b"MORE"] * 5
        counters = daemon.counters()
        assert counters["source_limit"] == refused
        assert counters["open"] == 5

        # A place that comes free is the source's to use.
        served.pop().close()
        until(lambda: daemon.counters()["open"] == 4)
        assert daemon.connect().ask(b"again") == b"AGAIN"


def test_refused_client_that_sends_reads_end_of_file() -> None:
    """Whether its input comes before or after the close, it reads no reset."""
    with Daemon(workers=1, max_connections_per_source=1) as daemon:
        assert daemon.connect().ask(b"one") == b"ONE"
        for _ in range(scaled(300, 10000)):
            refused = daemon.connect()
            refused.socket.send(b"let me in\n")
            assert refused.read_to_end() == b""
            refused.close()


def test_client_that_disconnects_before_it_is_refused_is_counted_once() -> None:
    with Daemon(workers=1, max_connections_per_source=1) as daemon:
        assert daemon.connect().ask(b"one") == b"ONE"
        with stopped(*daemon.workers()):
            daemon.connect().reset()
        until(lambda: daemon.counters()["source_limit"] == 1)
        assert daemon.counters()["reset"] == 0


def test_refusals_do_not_flood_the_log() -> None:
    with Daemon(workers=1, max_connections_per_source=1) as daemon:
        began = time.monotonic()
        assert daemon.connect().ask(b"one") == b"ONE"
        refused = scaled(200, 20000)
        for _ in range(refused):
            daemon.connect().close()
        until(lambda: daemon.counters()["source_limit"] == refused)
        said = daemon.log.count(
            "127.0.0.1 already has max_connections_per_source connections open"
        )
        assert 1 <= said <= 1 + (time.monotonic() - began) // QUIET


def test_refused_clients_occupy_no_place() -> None:
    """Not even if they stay connected: there is a place left for another source."""
    with Daemon(workers=1, max_connections=2, max_connections_per_source=1) as daemon:
        assert daemon.connect().ask(b"one") == b"ONE"
        refused = [daemon.connect() for _ in range(10)]
        address, source = endpoint(daemon.addresses[0]), ("127.0.0.2", 0)
        with socket.create_connection(address, DEADLINE, source) as other:
            other.sendall(b"other\n")
            assert other.recv(100) == b"OTHER\n"
        assert {client.read_to_end() for client in refused} == {b""}


def test_client_that_resets_before_it_is_refused_is_not_counted_as_open() -> None:
    with Daemon(workers=1, max_connections_per_source=1) as daemon:
        assert daemon.connect().ask(b"one") == b"ONE"
        rounds, each = scaled(2, 50), 100
        for _ in range(rounds):
            with stopped(*daemon.workers()):
                for _ in range(each):
                    daemon.connect().reset()
        until(lambda: daemon.counters()["accepted"] == 1 + rounds * each)
        counters = daemon.counters()
        assert counters["open"] == 1
        assert counters["bug"] == 0


def test_local_clients_have_no_source(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with Daemon(listen=[path], workers=1, max_connections_per_source=1) as daemon:
        clients = [daemon.connect() for _ in range(5)]
        assert [client.ask(b"one") for client in clients] == [b"ONE"] * 5


def test_limits_hold_over_a_reload() -> None:
    with Daemon(workers=1, max_connections_per_source=3) as daemon:
        served = [daemon.connect() for _ in range(3)]
        assert [client.ask(b"one") for client in served] == [b"ONE"] * 3
        daemon.reload(max_line=1000)
        assert [client.ask(b"more") for client in served] == [b"MORE"] * 3
        assert daemon.connect().read_to_end() == b""
        assert daemon.counters()["source_limit"] == 1
