"""Clients that connect to see whether the service is listening, as load balancers' health checks
do."""

from collections.abc import Callable

import pytest

from integration.client import Client
from integration.daemon import Daemon
from integration.embedding import ANY_PORT, CountingServer, connected, serving
from integration.processes import stopped
from tcpupperd.config import Config
from tcpupperd.serving.counters import IDLE_TIMEOUT, LINES, PROBE, RESET
from waiting import until


@pytest.mark.parametrize("leave", [Client.reset, Client.close, Client.end])
def test_probe_is_counted_apart_and_leaves_no_line(leave: Callable[[Client], None]) -> None:
    with Daemon(workers=1) as daemon:
        log = daemon.log
        for _ in range(3):
            leave(daemon.connect())
        until(lambda: daemon.counters()["probe"] == 3)
        until(lambda: daemon.counters()["open"] == 0)
        counters = daemon.counters()
        assert (counters["accepted"], counters["reset"]) == (3, 0)
        said = daemon.log.removeprefix(log).splitlines()
        assert all("counters: " in line for line in said)


def test_client_that_has_sent_something_is_no_probe(server: CountingServer) -> None:
    for data in (b"a line\n", b"half a line"):
        with connected(server) as client:
            client.send(data)
            client.end()
            assert client.read_to_end() == data.upper()
    until(lambda: server.tally.numbers[LINES] == 2)
    assert server.tally.numbers[PROBE] == 0


def test_client_that_disconnects_before_its_answer_is_no_probe() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect()
        until(lambda: daemon.counters()["open"] == 1)
        with stopped(*daemon.workers()):
            client.send(b"a line\n")
            client.reset()
        until(lambda: daemon.counters()["open"] == 0)
        counters = daemon.counters()
        assert (counters["lines"], counters["reset"], counters["probe"]) == (1, 1, 0)


def test_silent_client_whose_connection_we_end_is_no_probe() -> None:
    config = Config(idle_timeout=0.05)
    with serving(CountingServer(ANY_PORT, config=config)) as server, connected(server) as client:
        assert client.read_to_end() == b""
        client.close()
        until(lambda: len(server.connections) == 0)
        assert server.tally.numbers[IDLE_TIMEOUT] == 1
        assert server.tally.numbers[PROBE] == server.tally.numbers[RESET] == 0
