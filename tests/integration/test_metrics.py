"""The service `metrics` of a real daemon: what Prometheus and people read, and how other clients
are treated."""

import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from integration.client import Client, name_of
from integration.daemon import Daemon
from integration.scraper import LISTEN, get, scrape, value
from integration.service import Service
from tcpupperd.host.sockets import Listener
from tcpupperd.host.tcp_info import queue_of, time_in_queue
from tcpupperd.serving.acceptor import PRIVILEGED_EXTRA
from tcpupperd.serving.report import report_of, reports_of
from tools import need
from waiting import DEADLINE, until

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_prometheus_own_parser_and_linter_accept_the_metrics() -> None:
    with Daemon(listen=LISTEN) as daemon:
        assert daemon.connect().ask(b"hello") == b"HELLO"
        text = scrape(daemon)
        assert all(family.documentation for family in text_string_to_metric_families(text))
        linter = need("promtool")
        checked = subprocess.run(
            [linter, "check", "metrics"],
            input=text,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (checked.returncode, checked.stdout) == (0, "")


def test_each_worker_tells_of_all() -> None:
    with Daemon(listen=LISTEN, workers=2) as daemon:
        clients = [daemon.connect() for _ in range(20)]
        assert {client.ask(b"hello") for client in clients} == {b"HELLO"}
        (worker,) = {daemon.worker_of(clients[0])}
        os.kill(worker, signal.SIGKILL)
        daemon.wait_for_workers(2, without=worker)
        until(lambda: value(daemon, "tcpupperd_lines_total") == 20)
        for _ in range(20):
            assert value(daemon, "tcpupperd_lines_total") == 20
            assert value(daemon, "tcpupperd_workers_died_total", reason="signal") == 1


def test_each_listener_has_a_count_of_its_own() -> None:
    """Of all workers, and across reloads, even if an address is left out for a time."""
    second = "127.0.0.2:0"
    with Daemon(listen=[*LISTEN, second], workers=2) as daemon:
        addresses = [one for one in daemon.addresses if "=" not in one]

        def accepted() -> list[float]:
            name, service = "tcpupperd_listener_accepted_total", "upper"
            return [value(daemon, name, listener=one, service=service) for one in addresses]

        for count, address in zip((3, 5), addresses, strict=True):
            for client in [daemon.connect(address) for _ in range(count)]:
                assert client.ask(b"hello") == b"HELLO"
        assert accepted() == [3, 5]
        daemon.reload(workers=1)
        assert daemon.connect(addresses[1]).ask(b"hello") == b"HELLO"
        assert accepted() == [3, 6]
        daemon.reload(listen=LISTEN)
        assert addresses[1] not in page(daemon)
        daemon.reload(listen=[*LISTEN, addresses[1]])
        assert accepted() == [3, 6]
        row = f'<th scope="row">{addresses[1]}<td>upper<td class="number" id="listener-'
        assert row in page(daemon)


@pytest.mark.usefixtures("many_in_flight")
def test_peak_is_of_all_workers_and_of_no_connection_twice() -> None:
    with Daemon(listen=LISTEN, workers=2) as daemon:
        clients = [daemon.connect() for _ in range(40)]
        assert {client.ask(b"hello") for client in clients} == {b"HELLO"}

        def peak() -> float:
            return value(daemon, "tcpupperd_connections_open_peak")

        # Scrapers that read the answer and then close may overlap.
        scrapers = peak() - 40
        assert 0 <= scrapers <= 3
        for _ in range(5):
            daemon.reload()
        for client in clients[:30]:
            client.close()
        until(lambda: value(daemon, "tcpupperd_connections_open") <= 13)
        assert 40 <= peak() <= 43
        assert f"peak {peak():.0f}" in page(daemon)


def test_whether_the_file_on_disk_is_running() -> None:
    with Daemon(listen=LISTEN) as daemon:

        def seen() -> tuple[float, ...]:
            names = ("configuration_current", "last_reload_successful")
            return tuple(value(daemon, f"tcpupperd_{name}") for name in names)

        assert seen() == (1, 1)
        daemon.configure(max_line=100)
        assert seen() == (0, 1)
        daemon.reload()
        assert seen() == (1, 1)
        daemon.configure("nonsense = 1\n")
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "reload failed" in daemon.log)
        assert seen() == (0, 0)
        assert "The last reload failed" in page(daemon)
        daemon.reload()
        assert seen() == (1, 1)
        daemon.config.unlink()
        assert seen() == (0, 1)


def test_file_may_be_older_than_1970() -> None:
    with Daemon(listen=LISTEN) as daemon:
        daemon.configure(max_line=100)
        os.utime(daemon.config, ns=(-1, -1))
        assert value(daemon, "tcpupperd_configuration_current") == 0
        daemon.send_signal(signal.SIGHUP)
        until(lambda: value(daemon, "tcpupperd_configuration_current") == 1)


def page(daemon: Daemon) -> str:
    """The page for people."""
    status, header, text = get(daemon.address_of("metrics"), "/")
    assert (status, header["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert header["Cache-Control"] == "no-store"
    return text


def test_page_for_people_shows_the_daemon() -> None:
    with Daemon(listen=LISTEN, workers=2) as daemon:
        text = page(daemon)
        for shown in (*map(str, daemon.workers()), daemon.addresses[0], str(daemon.config)):
            assert shown in text
        assert 'class="bad"' not in text


def test_no_page_names_a_client() -> None:
    address = "127.98.7.6"
    with Daemon(listen=LISTEN, max_connections_per_source=1, workers=1) as daemon:
        host, _, port = daemon.addresses[0].rpartition(":")
        server, source = (host, int(port)), (address, 0)
        with socket.create_connection(server, DEADLINE, source) as client:
            client.sendall(b"hello\n")
            assert client.recv(6) == b"HELLO\n"
            with socket.create_connection(server, DEADLINE, source) as refused:
                assert refused.recv(1) == b""
            assert address in daemon.log
            assert address not in page(daemon) + scrape(daemon)


def test_listeners_are_in_an_order_of_their_own() -> None:
    """Not in the one in which they were passed, which changes."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        names = ("metrics", "tcpupperd.socket", "proxy", "tcpupperd.socket")
        listeners = [Listener(*pair) for pair in zip(sockets, names, strict=True)]
        found = reports_of(listeners, int)
        assert reports_of(reversed(listeners), int) == found
        assert [one.service for one in found] == ["upper", "upper", "proxy", "metrics"]


def test_queue_is_that_of_the_kernel() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=77) as listening:
        clients = [socket.create_connection(listening.getsockname()) for _ in range(3)]
        listener = Listener(listening, "tcpupperd.socket")
        assert report_of(listener, 5)[0] == "upper"
        until(lambda: report_of(listener, 5)[2:4] == (3, 77))
        for client in clients:
            client.close()


def test_kernel_may_not_say_how_long_a_queue_is(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        report = report_of(Listener(listening, "metrics"), None)
        assert (report.address, report.queue, report.queue_limit) == (path, None, None)
        assert time_in_queue(listening) == 0
    gone = socket.socket()
    gone.close()
    assert (queue_of(gone), time_in_queue(gone)) == ((), 0)


def test_two_services_do_not_share_an_address() -> None:
    with Daemon() as other:
        address = other.addresses[0]
    status, log = Daemon(listen=[address, f"metrics={address}"]).run()
    assert status == 71
    assert (
        f"cannot listen on metrics={address}: {address} is already used by the upper service"
        in log
    )


def test_reload_can_give_an_address_to_another_service() -> None:
    with Daemon() as daemon:
        address = daemon.addresses[0]
        old = daemon.connect()
        daemon.reload(listen=[f"metrics={address}"])
        until(lambda: get(address)[0] == 200)
        assert old.ask(b"still") == b"STILL"
        daemon.reload(listen=[address])
        until(lambda: get(address)[0] == 0)
        daemon.wait_for_workers(2)
        assert daemon.connect(address).ask(b"again") == b"AGAIN"


# Slow, huge and hostile clients


def test_half_a_request_ends_as_an_unfinished_line_does() -> None:
    with Daemon(listen=LISTEN, line_timeout=0.2) as daemon:
        slow = daemon.connect(daemon.address_of("metrics"))
        slow.send(REQUEST[:-1])
        assert slow.read_to_end() == b""
        assert daemon.counters()["line_timeout"] == 1


def test_empty_lines_do_not_keep_a_connection_open() -> None:
    """They may precede a request, but line_timeout begins with the first of them."""
    with Daemon(listen=LISTEN, line_timeout=0.4, idle_timeout=60) as daemon:
        scraper = daemon.connect(daemon.address_of("metrics"))
        ends = time.monotonic() + DEADLINE
        while time.monotonic() < ends and not select.select([scraper.socket], [], [], 0.1)[0]:
            scraper.send(b"\r\n")
        assert scraper.read_to_end() == b""
        assert daemon.counters()["line_timeout"] == 1


def test_silent_scraper_ends_as_an_idle_client_does() -> None:
    with Daemon(listen=LISTEN, idle_timeout=0.2) as daemon:
        assert daemon.connect(daemon.address_of("metrics")).read_to_end() == b""
        assert daemon.counters()["idle_timeout"] == 1


def test_silent_scraper_keeps_its_place_no_longer_than_a_request_may_take() -> None:
    with Daemon(listen=LISTEN, line_timeout=0.2) as daemon:
        assert daemon.connect(daemon.address_of("metrics")).read_to_end() == b""
        assert daemon.counters()["line_timeout"] == 1


def test_flood_is_refused_and_ended() -> None:
    with Daemon(listen=LISTEN) as daemon:
        flood = daemon.connect(daemon.address_of("metrics"))
        flood.send(b"GET /" + b"x" * 100_000)
        assert flood.read_line().startswith(b"HTTP/1.1 431 ")
        flood.wait_for_end()


def test_scrapers_count_as_clients_do() -> None:
    with Daemon(listen=LISTEN, workers=1, max_connections_per_source=3) as daemon:
        address = daemon.address_of("metrics")
        taken = [daemon.connect(address) for _ in range(3)]
        until(lambda: daemon.counters()["open"] == 3)
        assert daemon.connect(address).read_to_end() == b""
        taken[0].close()
        until(lambda: daemon.counters()["open"] == 2)
        assert get(address)[0] == 200


def test_full_worker_is_still_scraped() -> None:
    with Daemon(listen=LISTEN, workers=1, max_connections=5) as daemon:
        served = [daemon.connect() for _ in range(5)]
        assert {client.ask(b"hello") for client in served} == {b"HELLO"}
        waiting = daemon.connect()
        waiting.send(b"waiting\n")
        for _ in range(2 * PRIVILEGED_EXTRA):
            assert value(daemon, "tcpupperd_connections_open") >= 5
        assert value(daemon, "tcpupperd_connections_limit") == 5
        assert value(daemon, "tcpupperd_lines_total") == 5
        assert value(daemon, "tcpupperd_accept_pauses_total") == 1  # and it is not over
        assert "accepting connections again" not in daemon.log

        # Scrapers are limited as well, and never permanently take the place of a client.
        silent = [
            daemon.connect(daemon.address_of("metrics")) for _ in range(PRIVILEGED_EXTRA + 3)
        ]
        until(lambda: daemon.counters()["open"] == 5 + PRIVILEGED_EXTRA)
        assert [client.ask(b"more") for client in served] == [b"MORE"] * 5
        assert daemon.counters()["open"] == 5 + PRIVILEGED_EXTRA
        for client in silent + served:
            client.close()
        assert waiting.read_line() == b"WAITING\n"
        until(lambda: daemon.counters()["open"] == 1)
        assert daemon.connect().ask(b"new") == b"NEW"
        until(lambda: "accepting connections again" in daemon.log)


def test_many_simultaneous_scrapers_get_whole_pages_and_hinder_no_client() -> None:
    with Daemon(listen=LISTEN) as daemon:
        client = daemon.connect()
        scrapers = [daemon.connect(daemon.address_of("metrics")) for _ in range(200)]
        for one in scrapers:
            one.send(REQUEST)
            assert client.ask(b"hello") == b"HELLO"
        for one in scrapers:
            head, _, body = one.read_to_end().partition(b"\r\n\r\n")
            assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")


# Handover


@pytest.mark.usefixtures("many_in_flight")
def test_half_a_request_survives_a_reload() -> None:
    with Daemon(listen=LISTEN) as daemon:
        scrapers = [daemon.connect(daemon.address_of("metrics")) for _ in range(len(REQUEST))]
        for size, one in enumerate(scrapers):
            one.send(REQUEST[:size])
        daemon.reload()
        for size, one in enumerate(scrapers):
            one.send(REQUEST[size:])
            assert one.read_to_end().startswith(b"HTTP/1.1 200 OK\r\n")


def test_peaks_include_connections_that_were_taken_over(
    service: Service, metrics: socket.socket
) -> None:
    """In both workers, although one of them accepts no connection, not even that of a scraper."""
    with daemon_with(metrics, service):
        for client in [service.connect() for _ in range(20)]:
            assert client.ask(b"hello") == b"HELLO"
    with daemon_with(metrics, service) as daemon:
        until(lambda: daemon.log.count("took over ") == 2)
        rows = r'<td>serving<td class="number">(\d+)<td class="number">(\d+)'
        found = [tuple(map(int, row)) for row in re.findall(rows, page(daemon))]
        assert len(found) == 2
        assert all(0 < now <= most <= 11 for now, most in found)
        assert 20 <= value(daemon, "tcpupperd_connections_open_peak") <= 22


@pytest.fixture
def metrics(service: Service) -> Iterator[socket.socket]:
    """Another socket of the service, passed in under the name that systemd gives it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_half_a_request_survives_a_restart(service: Service, metrics: socket.socket) -> None:
    address = name_of(metrics)
    with daemon_with(metrics, service):
        upper, scraper = service.connect(), Client(address)
        service.clients.append(scraper)
        assert upper.ask(b"one") == b"ONE"
        scraper.send(REQUEST[:20])
        assert get(address)[0] == 200
    with daemon_with(metrics, service):
        scraper.send(REQUEST[20:])
        assert scraper.read_to_end().startswith(b"HTTP/1.1 200 OK\r\n")
        assert upper.ask(b"two") == b"TWO"


def daemon_with(metrics: socket.socket, service: Service) -> Daemon:
    """The next daemon of a service, with another socket."""
    passed = [("tcpupperd.socket", service.listener), ("metrics", metrics)]
    daemon = Daemon(manager=service.manager, passed=[*passed, *service.manager.stored.items()])
    daemon.ended_by = signal.SIGUSR2
    return daemon
