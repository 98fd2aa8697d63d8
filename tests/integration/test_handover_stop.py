"""A stop without a service manager: a client that has connected, or is about to, gets an
answer."""

import contextlib
import signal
import socket
import struct
import subprocess
import threading
from collections import Counter
from pathlib import Path
from time import monotonic

import pytest

from integration.client import make_socket, where
from integration.daemon import Daemon
from integration.measures import scaled
from integration.processes import stopped
from tcpupperd.serving.connection import LINGER_TIME, NEW_CLIENT_TIME
from waiting import DEADLINE, until

STOPS = scaled(3, 40)
CLIENTS = 24

#: A filter of socket(7) that drops whatever comes.
DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27


def may_filter() -> bool:
    """Whether the kernel lets this user filter what comes to a TCP socket: to some, only root."""
    drop = bytearray(DROP_ALL)
    with socket.socket() as probe:
        try:
            program = struct.pack("HP", 1, address_of(drop))
            probe.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        except PermissionError:
            return False
    return True


filters = pytest.mark.skipif("not may_filter()", reason="only root may filter a TCP socket here")


class Storm:
    """Clients that connect, ask and hang up without pause until they are refused."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def wait_for_end(self) -> None:
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()

    def _run(self) -> None:
        outcome = "answered"
        while outcome == "answered":
            with make_socket(self._address) as connection:
                outcome = self._ask(connection)
            self.outcomes[outcome] += 1

    def _ask(self, connection: socket.socket) -> str:
        connection.settimeout(DEADLINE)
        try:
            connection.connect(where(self._address))
        except (ConnectionRefusedError, FileNotFoundError):
            return "refused"
        except OSError as error:
            return f"not connected: {error}"
        try:
            connection.sendall(b"hello\n")
            answer = connection.recv(100)
            return "answered" if answer == b"HELLO\n" else f"wrong: {answer!r}"
        except OSError as error:
            return f"lost: {error}"


@pytest.mark.parametrize("family", [pytest.param("tcp", marks=filters), "unix"])
def test_no_client_that_has_connected_is_lost(family: str, tmp_path: Path) -> None:
    address = "127.0.0.1:0" if family == "tcp" else f"{tmp_path}/socket"
    outcomes: Counter[str] = Counter()
    for _ in range(STOPS):
        with Daemon(listen=[address]) as daemon:
            storm = Storm(daemon.addresses[0])
            until(lambda: storm.outcomes["answered"] > 10 * CLIENTS)  # noqa: B023
            daemon.stop()
            storm.wait_for_end()
            outcomes += storm.outcomes
    assert outcomes.pop("answered") > 10 * CLIENTS * STOPS
    assert outcomes == {"refused": CLIENTS * STOPS}


@filters
def test_handshake_under_way_ends_well() -> None:
    """The daemon's SYN,ACK is lost on the way, and arrives when it is retransmitted, a second
    later."""
    with Daemon() as daemon, make_socket(daemon.addresses[0]) as connection:
        drop = bytearray(DROP_ALL)
        program = struct.pack("HP", 1, address_of(drop))
        connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        connection.setblocking(False)
        assert connection.connect_ex(where(daemon.addresses[0]))
        daemon.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in daemon.log)
        connection.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        connection.settimeout(DEADLINE)
        connection.sendall(b"hello\n")
        assert connection.recv(100) == b"HELLO\n"
        assert daemon.wait() == 0


def test_newcomer_is_heard() -> None:
    """One who has connected and says something only when the daemon accepts no more. On a busy
    machine, it may take several attempts to say it in time."""
    until(newcomer_is_in_time)


def newcomer_is_in_time() -> bool:
    """Whether it was; if so, it was heard."""
    with Daemon() as daemon:
        with stopped(*daemon.workers()):
            client = daemon.connect()
            daemon.send_signal(signal.SIGTERM)
            until(lambda: "stopping" in daemon.log)
            began = monotonic()
        until(lambda: is_free(client.peer_port))
        with contextlib.suppress(ConnectionError):
            client.send(b"hello\n")
        in_time = monotonic() - began < NEW_CLIENT_TIME
        if in_time:
            assert client.read_to_end() == b"HELLO\n"
        client.close()
        assert daemon.wait() == 0
        return in_time


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of the loopback interface."""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def test_slow_client_may_still_send_and_reads_all() -> None:
    """All answers are with the kernel, which would throw them away if something came from the
    client after the connection was closed here."""
    lines = b"".join(b"line %d\n" % number for number in range(10_000))
    with Daemon() as daemon:
        client = daemon.connect(receive_buffer=16384)
        client.send(lines)
        until(lambda: daemon.counters()["sent_bytes"] == len(lines))
        daemon.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            daemon.wait(LINGER_TIME + 1)
        client.send(b"is anybody there?\n")
        assert client.read_to_end() == lines.upper()
        client.close()
        assert daemon.wait() == 0


def address_of(memory: bytearray) -> int:
    """Where in this process's memory it is."""
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
