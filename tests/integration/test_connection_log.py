"""The journal's entries about connections that have ended."""

import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from entries import Entries, Entry, LiveEntries
from integration.client import OWN, Client
from integration.daemon import Daemon
from integration.journal import BUG, Journal
from integration.service import Service
from proxy_headers import AUTHORITY, CLIENT, binary, line, tlv
from tcpupperd.events import Event
from waiting import until


class Ended:
    """The entries on connections that have ended."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self._found: list[Entry] = []

    def of(self, port: int) -> list[Entry]:
        """Those of a client."""
        wanted = {"MESSAGE_ID": Event.CONNECTION_ENDED.message_id, "TCPUPPERD_PORT": str(port)}
        self._found += self._entries.read()
        return [entry for entry in self._found if wanted.items() <= entry.items()]

    def the(self, port: int) -> Entry:
        """The one of a client, once it is there."""
        (entry,) = until(lambda: self.of(port))
        return entry


@pytest.fixture
def ended(journal: Journal) -> Iterator[Ended]:
    with LiveEntries(journal.socket) as entries:
        yield Ended(entries)


def test_connection_is_logged_once_with_its_totals_from_all_processes(
    service: Service, journal: Journal, ended: Ended
) -> None:
    with service.daemon(wrapper=journal.wrapper, log_connections=True):
        client = service.connect()
        port = client.port
        assert client.ask(b"hello") == b"HELLO"
        client.send(b"wor")
    with service.daemon(wrapper=journal.wrapper, log_connections=True) as daemon:
        assert client.ask(b"ld") == b"WORLD"
        worker = daemon.worker_of(client)
        client.close()
        entry = ended.the(port)
    assert ended.of(port) == [entry]
    assert entry["MESSAGE"].startswith(f"127.0.0.1:{port}: client closed after 2 lines in ")
    assert entry["PRIORITY"] == "6"
    assert entry["TCPUPPERD_CLIENT"] == "127.0.0.1"
    assert entry["TCPUPPERD_LISTENER"] == service.address
    assert entry["TCPUPPERD_WORKER"] == entry["TID"] == str(worker)
    assert entry["TCPUPPERD_REASON"] == "client closed"
    assert entry["TCPUPPERD_LINES"] == "2"
    assert (entry["TCPUPPERD_RECEIVED"], entry["TCPUPPERD_SENT"]) == ("12", "12")
    assert int(entry["TCPUPPERD_DURATION_USEC"]) > 0
    assert int(entry["TCPUPPERD_CONNECTION"], 16) > 0


def test_entry_of_an_introduced_client_survives_a_restart(
    service: Service, journal: Journal, ended: Ended
) -> None:
    """What the load balancer has said is handed over with the connection."""
    header = binary(tlvs=[tlv(AUTHORITY, b"example.org")])
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        host, port = proxy.getsockname()

        def daemon() -> Daemon:
            passed = [("proxy", proxy), *service.manager.stored.items()]
            one = Daemon(
                manager=service.manager,
                passed=passed,
                wrapper=journal.wrapper,
                log_connections=True,
                greeting="{balancer} {destination} {authority}",
            )
            one.ended_by = signal.SIGUSR2
            return one

        with daemon():
            client = Client(f"{host}:{port}")
            client.send(header + b"hel")
            assert client.read_line() == b"127.0.0.1 192.0.2.1:443 example.org\n"
        with daemon():
            assert client.ask(b"lo") == b"HELLO"
            balancers_port = str(client.port)
            client.close()
            entry = ended.the(CLIENT[1])
    assert entry["TCPUPPERD_CLIENT"] == CLIENT[0]
    assert entry["TCPUPPERD_BALANCER"] == "127.0.0.1"
    assert entry["TCPUPPERD_BALANCER_PORT"] == balancers_port
    assert entry["TCPUPPERD_DESTINATION"] == "192.0.2.1:443"
    assert entry["TCPUPPERD_AUTHORITY"] == "example.org"


def test_entries_of_refused_headers_all_say_why(journal: Journal, ended: Ended) -> None:
    listen = ["proxy=127.0.0.1:0"]
    with Daemon(listen=listen, wrapper=journal.wrapper, log_connections=True) as daemon:
        for size in (3, 4):
            client = daemon.connect(daemon.address_of("proxy"))
            client.send(binary(bytes(size)))
            assert client.read_to_end() == b""
            entry = ended.the(client.port)
            why = f"proxy invalid: the length is {size}, but the addresses take 12 bytes, after"
            assert why in entry["MESSAGE"]
            assert entry["TCPUPPERD_REASON"] == "proxy invalid"
            assert entry["TCPUPPERD_SERVICE"] == "proxy"


def test_clients_refused_before_they_are_served_have_an_entry(
    journal: Journal, ended: Ended
) -> None:
    with Daemon(
        listen=["127.0.0.1:0", "proxy=127.0.0.1:0"],
        workers=1,
        wrapper=journal.wrapper,
        log_connections=True,
        max_connections_per_source=1,
        proxy_from=["192.0.2.1"],
    ) as daemon:
        upper = next(one for one in daemon.addresses if "=" not in one)
        assert daemon.connect(upper).ask(b"hello") == b"HELLO"
        proxy = daemon.address_of("proxy")
        for address, service, reason in (
            (upper, "upper", "source limit"),
            (proxy, "proxy", "proxy untrusted"),
            (proxy, "proxy", "proxy untrusted"),
        ):
            client = daemon.connect(address)
            assert client.read_to_end() == b""
            entry = ended.the(client.port)
            start = f"127.0.0.1:{client.port}: {reason} after 0 lines in "
            assert entry["MESSAGE"].startswith(start)
            assert entry["TCPUPPERD_REASON"] == reason
            assert entry["TCPUPPERD_SERVICE"] == service
            assert entry["TCPUPPERD_LISTENER"] == address


def test_entries_tell_services_apart(journal: Journal, ended: Ended) -> None:
    listen = ["127.0.0.1:0", "agent=127.0.0.1:0"]
    with Daemon(listen=listen, wrapper=journal.wrapper, log_connections=True) as daemon:
        balancer = daemon.connect(daemon.address_of("agent"))
        assert balancer.read_to_end() == b"up 100%\n"
        port = balancer.port
        balancer.close()
        entry = ended.the(port)
        assert entry["MESSAGE"].startswith(f"127.0.0.1:{port}: agent: complete in ")
        assert entry["TCPUPPERD_SERVICE"] == "agent"
        client = daemon.connect()
        assert client.ask(b"hello") == b"HELLO"
        port = client.port
        client.close()
        assert ended.the(port)["TCPUPPERD_SERVICE"] == "upper"


def say_nothing(client: Client) -> None:
    client.wait_for_end()
    client.close()


def begin_a_line(client: Client) -> None:
    client.send(b"hal")
    say_nothing(client)


def send_a_line(client: Client) -> None:
    client.send(b"hello\n")
    say_nothing(client)


def answered(end: Callable[[Client], None]) -> Callable[[Client], None]:
    """What a client does that ends the connection once it has an answer."""

    def act(client: Client) -> None:
        assert client.ask(b"hello") == b"HELLO"
        end(client)

    return act


def send_bug(client: Client) -> None:
    client.send(b"bug\n")
    say_nothing(client)


REASONS: list[tuple[str, dict[str, Any], Callable[[Client], None]]] = [
    ("client closed", {}, answered(Client.close)),
    ("connection reset by peer", {}, answered(Client.reset)),
    ("probe", {}, Client.close),
    ("probe", {}, Client.reset),
    ("complete", {"lines_per_connection": 1}, send_a_line),
    ("idle timeout", {"idle_timeout": 0.1}, say_nothing),
    ("line timeout", {"line_timeout": 0.1}, begin_a_line),
    ("bug", {}, send_bug),
]


@pytest.mark.parametrize(("reason", "settings", "act"), REASONS, ids=range(len(REASONS)))
def test_reason_is_told(
    journal: Journal,
    ended: Ended,
    reason: str,
    settings: dict[str, Any],
    act: Callable[[Client], None],
) -> None:
    with journal.customize.open("a") as file:
        file.write(BUG)
    with Daemon(wrapper=journal.wrapper, log_connections=True, **settings) as daemon:
        client = daemon.connect()
        port = client.port
        act(client)
        assert ended.the(port)["TCPUPPERD_REASON"] == reason


def test_reason_is_told_of_those_who_read_no_answer(journal: Journal, ended: Ended) -> None:
    with Daemon(wrapper=journal.wrapper, log_connections=True) as daemon:
        client = daemon.connect(receive_buffer=4096)
        port = client.port
        daemon.clog(client)
        daemon.configure(write_timeout=0.1)
        daemon.send_signal(signal.SIGHUP)
        entry = ended.the(port)
    assert entry["TCPUPPERD_REASON"] == "write timeout"


def test_reason_is_told_although_another_worker_closes(journal: Journal, ended: Ended) -> None:
    with Daemon(wrapper=journal.wrapper, log_connections=True, idle_timeout=0.1) as daemon:
        client = daemon.connect()
        port = client.port
        assert client.read_to_end() == b""  # the worker is now waiting for the client to close
        old = daemon.workers()
        daemon.send_signal(signal.SIGHUP)
        until(lambda: not set(old) & set(daemon.workers()))
        client.close()
        assert ended.the(port)["TCPUPPERD_REASON"] == "idle timeout"


def test_reason_is_told_at_a_stop(journal: Journal, ended: Ended) -> None:
    with Daemon(wrapper=journal.wrapper, log_connections=True) as daemon:
        client = daemon.connect()
        port = client.port
        assert client.ask(b"hello") == b"HELLO"
        daemon.send_signal(signal.SIGTERM)
        client.wait_for_end()
        client.close()
        daemon.wait()
        assert ended.the(port)["TCPUPPERD_REASON"] == "service stopped"


def test_client_behind_a_proxy_is_the_one_that_was_introduced(
    journal: Journal, ended: Ended
) -> None:
    with Daemon(
        wrapper=journal.wrapper,
        listen=["proxy=127.0.0.1:0"],
        proxy_from=["127.0.0.1"],
        log_connections=True,
    ) as daemon:
        address = daemon.addresses[0].removeprefix("proxy=")
        client = daemon.connect(address)
        header = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 9999\r\n"
        client.send(header)
        assert client.ask(b"hello") == b"HELLO"
        client.close()
        entry = ended.the(4711)
        assert entry["TCPUPPERD_CLIENT"] == "192.0.2.7"
        assert entry["TCPUPPERD_LISTENER"] == address
        assert entry["TCPUPPERD_RECEIVED"] == str(len(header) + 6)
        refused = daemon.connect(address)
        port = refused.port
        refused.send(b"no header\n")
        refused.wait_for_end()
        assert ended.the(port)["TCPUPPERD_REASON"] == "proxy absent"


def test_client_cannot_write_lines_into_the_log() -> None:
    """The name of a client's Unix socket is the client's choice."""
    where = OWN.removeprefix("@")
    with Daemon(listen=[OWN], log_connections=True) as daemon:
        with socket.socket(socket.AF_UNIX) as client:
            client.bind(f"\0{where}\nforged".encode())
            client.connect(f"\0{where}".encode())
        until(lambda: "probe after" in daemon.log)
        assert f" INFO @{where}\\nforged: probe after " in daemon.log


def test_connection_through_a_unix_socket_has_the_fields_that_there_are(journal: Journal) -> None:
    address = f"{OWN}-ended"
    with LiveEntries(journal.socket) as entries:
        with Daemon(wrapper=journal.wrapper, listen=[address], log_connections=True) as daemon:
            client = daemon.connect()
            assert client.ask(b"hello") == b"HELLO"
            client.close()
        (entry,) = [one for one in entries.read() if "TCPUPPERD_REASON" in one]
    assert entry["TCPUPPERD_CLIENT"] == "local client"
    assert entry["TCPUPPERD_LISTENER"] == address
    assert entry["TCPUPPERD_LINES"] == "1"
    assert not {"TCPUPPERD_PORT", "TCPUPPERD_RECEIVED", "TCPUPPERD_SENT"} & entry.keys()


def test_nothing_is_told_unless_it_is_wanted(journal: Journal) -> None:
    with LiveEntries(journal.socket) as entries:
        with Daemon(wrapper=journal.wrapper) as daemon:
            assert daemon.connect().ask(b"hello") == b"HELLO"
        assert not any("TCPUPPERD_CLIENT" in entry for entry in entries.read())


def test_client_of_a_load_balancer_is_told_by_its_own_address(
    service: Service, journal: Journal, ended: Ended
) -> None:
    service.name = "proxy"
    settings = {"log_connections": True, "workers": 1, "max_connections_per_source": 1}
    with service.daemon(wrapper=journal.wrapper, **settings):
        clients = [service.connect() for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(line((f"10.0.0.{number}", 40000 + number)))
            assert client.ask(b"hello") == b"HELLO"
        refused = service.connect()
        refused.send(line(("10.0.0.7", 50000)))
        refused.wait_for_end()
        entry = ended.the(50000)
        assert entry["TCPUPPERD_CLIENT"] == "10.0.0.7"
        assert entry["TCPUPPERD_REASON"] == "source limit"
    with service.daemon(wrapper=journal.wrapper, **settings):
        for number, client in enumerate(clients):
            assert client.ask(b"again") == b"AGAIN"
            client.close()
            # Immediately, because the test's socket holds few entries.
            entry = ended.the(40000 + number)
            assert entry["TCPUPPERD_CLIENT"] == f"10.0.0.{number}"
            assert entry["TCPUPPERD_LINES"] == "2"
