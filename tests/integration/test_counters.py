"""The counters of clients, workers and reloads, and which of them survive."""

import os
import signal
from io import FileIO
from time import monotonic, sleep

from integration.daemon import Daemon
from integration.processes import stopped
from integration.scraper import LISTEN, get, value
from integration.service import Service
from outlive.memfd import sealed
from tcpupperd.processes.store import RESTARTS, RESTARTS_MAX
from waiting import until


def test_administrators_and_load_balancers_are_no_clients() -> None:
    listen = ["127.0.0.1:0", "agent=127.0.0.1:0", "metrics=127.0.0.1:0"]
    with Daemon(listen=listen) as daemon:
        for _ in range(3):
            assert daemon.connect(daemon.address_of("agent")).read_to_end() == b"up 100%\n"
        assert get(daemon.address_of("metrics"))[0] == 200
        counters = daemon.counters()
        assert counters["accepted"] == 0
        assert (counters["requests_agent"], counters["requests_metrics"]) == (3, 1)
        assert daemon.connect().ask(b"hello") == b"HELLO"
        assert daemon.counters()["accepted"] == 1


def test_counters_of_a_killed_worker_stay_in_the_totals() -> None:
    with Daemon(workers=1) as daemon:
        assert daemon.connect().ask(b"one") == b"ONE"
        until(lambda: daemon.counters()["lines"] == 1)
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        daemon.wait_for_workers(1, without=worker)
        assert daemon.connect().ask(b"two") == b"TWO"
        until(lambda: daemon.counters()["lines"] == 2)
        counters = daemon.counters()
        assert (counters["accepted"], counters["open"]) == (2, 2)
        assert (counters["workers_started"], counters["workers_died_signal"]) == (2, 1)


def test_connections_of_a_killed_worker_are_counted_as_lost() -> None:
    with Daemon(workers=1) as daemon:
        clients = [daemon.connect() for _ in range(3)]
        assert [client.ask(b"hello") for client in clients] == [b"HELLO"] * 3
        until(lambda: daemon.counters()["open"] == 3)
        (worker,) = daemon.workers()
        daemon.kill_with_keeper(worker)
        daemon.wait_for_workers(1, without=worker)
        until(lambda: daemon.counters()["worker_died"] == 3)


def test_every_connection_is_counted_once_by_the_reason_of_its_end() -> None:
    """Whatever connections do, each accepted one is open, handed over, refused, or ended for one
    reason."""
    with Daemon(listen=LISTEN, line_timeout=0.2, lines_per_connection=2) as daemon:

        def ended(reason: str) -> None:
            expected[reason] = expected.get(reason, 0) + 1
            until(lambda: {name: daemon.counters()[name] for name in expected} == expected)

        expected: dict[str, int] = {}
        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        client.end()
        assert client.read_to_end() == b""
        ended("client_closed")

        client = daemon.connect()
        assert (client.ask(b"one"), client.ask(b"two")) == (b"ONE", b"TWO")
        assert client.read_to_end() == b""
        client.close()
        ended("complete")

        with stopped(*daemon.workers()):  # so that it is there before line_timeout expires
            scraper = daemon.connect(daemon.address_of("metrics"))
            scraper.send(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert scraper.read_to_end().startswith(b"HTTP/1.1 200 OK")
        scraper.reset()  # while the server lingers
        ended("complete")

        slow = daemon.connect()
        slow.send(b"half a li")
        assert slow.read_to_end() == b""
        slow.close()
        ended("line_timeout")

        daemon.connect().close()
        ended("probe")

        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        client.reset()
        ended("reset")

        client = daemon.connect()
        assert client.ask(b"one") == b"ONE"
        daemon.reload()
        until(lambda: daemon.counters()["handed_over_in"] >= 1)
        client.reset()
        ended("reset")

        until(lambda: daemon.counters()["open"] == 0)
        counters = daemon.counters()
        accepted = counters["accepted"] + counters["requests_metrics"]
        assert sum(expected.values()) == accepted == 7
        assert counters["handed_over_in"] == counters["handed_over_out"]


def test_bytes_are_counted_in_both_directions() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect()
        for piece in (b"hello\n", b"two\nlines\n", b"half a ", b"line\nand mo"):
            client.send(piece)
        client.end()
        assert client.read_to_end() == b"HELLO\nTWO\nLINES\nHALF A LINE\nAND MO"
        until(
            lambda: (
                (daemon.counters()["received_bytes"], daemon.counters()["sent_bytes"]) == (34, 34)
            )
        )


def test_bytes_after_a_header_are_counted_once() -> None:
    header = b"PROXY TCP4 192.0.2.7 192.0.2.1 56324 9999\r\n"
    with Daemon(listen=["proxy=127.0.0.1:0"]) as daemon:
        client = daemon.connect(daemon.address_of("proxy"))
        client.send(header + b"hello\n")
        client.end()
        assert client.read_to_end() == b"HELLO\n"
        until(lambda: daemon.counters()["open"] == 0)
        counters = daemon.counters()
        assert (counters["received_bytes"], counters["sent_bytes"]) == (len(header) + 6, 6)


def test_bytes_that_do_not_fit_are_counted_when_they_are_sent() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect(receive_buffer=4096)
        sent = daemon.clog(client)
        client.end()
        assert len(client.read_to_end()) == len(sent)
        until(lambda: daemon.counters()["sent_bytes"] == len(sent))
        assert daemon.counters()["received_bytes"] == len(sent)


def test_loop_iterations_and_the_time_in_them_are_counted() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect()
        before, began = daemon.counters(), monotonic()
        for _ in range(1000):
            assert client.ask(b"hello") == b"HELLO"
        until(lambda: daemon.counters()["loop_iterations"] >= before["loop_iterations"] + 1000)
        counters, took = daemon.counters(), monotonic() - began
        assert 0 < counters["loop_microseconds"] - before["loop_microseconds"] <= took * 1_000_000


def test_longest_wait_to_be_accepted_is_the_kernels() -> None:
    with Daemon(listen=LISTEN, workers=1) as daemon:
        with stopped(*daemon.workers()):
            waiting = daemon.connect()
            sleep(0.4)  # what is measured, not a wait
        assert waiting.ask(b"hello") == b"HELLO"
        until(lambda: value(daemon, "tcpupperd_accept_queue_longest_seconds") >= 0.3)


def test_longest_iteration_is_no_longer_than_the_time_that_passed() -> None:
    began = monotonic()
    with Daemon(listen=LISTEN, workers=1) as daemon:
        assert daemon.connect().ask(b"hello") == b"HELLO"
        assert 0 < value(daemon, "tcpupperd_loop_longest_seconds") < monotonic() - began


def test_restarts_that_connections_survived_are_counted(service: Service) -> None:
    for restarts in range(3):
        with service.daemon() as daemon:
            assert daemon.counters()["restarts"] == restarts


def test_stored_number_of_restarts_may_be_nonsense(service: Service) -> None:
    with service.daemon():
        until(lambda: RESTARTS in service.manager.stored)
    for content in (b"many", b"-1", b"\xff", b"", b"9" * 4000, b"9" * 5000):
        service.manager.stored.pop(RESTARTS).close()
        service.manager.stored[RESTARTS] = FileIO(sealed(content))
        with service.daemon() as daemon:
            assert 0 < daemon.counters()["restarts"] <= RESTARTS_MAX + 1, content


def test_reloads_are_counted_by_how_they_ended() -> None:
    with Daemon() as daemon:
        assert daemon.connect().ask(b"one") == b"ONE"
        daemon.reload()
        daemon.configure("nonsense = 1\n")
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "reload failed" in daemon.log)
        counters = daemon.counters()
        assert (counters["reloads_success"], counters["reloads_failure"]) == (1, 1)
        assert (counters["lines"], counters["workers_started"]) == (1, 4)
        assert not any(number for name, number in counters.items() if "workers_died" in name)


def test_worker_that_does_not_exit_in_time_is_counted() -> None:
    with Daemon(workers=1, drain_timeout=0) as daemon:
        (worker,) = daemon.workers()
        with stopped(worker):
            daemon.reload()
            until(lambda: daemon.counters()["workers_died_kill_timeout"] == 1)
        assert daemon.counters()["workers_died_signal"] == 0
