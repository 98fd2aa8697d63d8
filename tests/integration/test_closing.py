"""Connections that are closed while the daemon has answers left: all arrive, then end of file."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest

from integration.client import Client, many_lines
from integration.daemon import Daemon
from integration.measures import cpu_share, scaled
from waiting import until

ROUNDS = scaled(20, 1000)


@pytest.mark.parametrize("rest", [b"", b"two\n", bytes(many_lines()[:4_000_000])])
def test_daemon_ends_first_with_input_unread(rest: bytes) -> None:
    """Input that is not read, or still arrives, must not make the kernel reset the connection."""
    with Daemon(workers=1, lines_per_connection=1) as daemon:
        for _ in range(ROUNDS if len(rest) < 100 else ROUNDS // 10):
            client = daemon.connect()
            with sending(client, b"one\n" + rest):
                assert client.read_to_end() == b"ONE\n"
            client.close()
        until(lambda: daemon.counters()["open"] == 0)


def test_half_close_while_stalled() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect(receive_buffer=4096)
        sent = daemon.clog(client)
        client.end()
        wait_for_rest(daemon)
        assert client.read_to_end() == sent.upper()


@pytest.mark.parametrize("more", [b"", b"one more\n" * 50_000])
def test_daemon_ends_while_stalled(more: bytes) -> None:
    """A client that takes answers slowly has sent its last line, and then more than is read, or
    nothing, not even an end."""
    limit = 1000
    sent = (b"x" * 4000 + b"\n") * limit
    with Daemon(workers=1, lines_per_connection=limit) as daemon:
        client = daemon.connect(receive_buffer=4096)
        with sending(client, sent + more, end=bool(more)):
            until(lambda: daemon.counters()["lines"] > 0)
            wait_for_rest(daemon)
            assert client.read_to_end() == sent.upper()


@pytest.mark.parametrize("client_ends", [True, False])
def test_stop_while_stalled(client_ends: bool) -> None:
    with Daemon(workers=1, drain_timeout=60) as daemon:
        client = daemon.connect(receive_buffer=4096)
        sent = daemon.clog(client)
        if client_ends:
            client.end()
        daemon.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in daemon.log)
        wait_for_rest(daemon)
        answers = client.read_to_end()
        assert sent.upper().startswith(answers)
        # What was not received when the daemon stopped is not answered, and may be lost.
        assert len(answers) == len(sent) or not client_ends
        client.close()
        assert daemon.wait() == 0


def test_end_of_a_client_that_never_reads() -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect(receive_buffer=4096)
        daemon.clog(client)
        client.end()
        daemon.reload(write_timeout=2)
        daemon.wait_for_workers(1)
        wait_for_rest(daemon)
        until(lambda: daemon.counters()["write_timeout"] == 1)


def wait_for_rest(daemon: Daemon) -> None:
    """Nothing to do is nothing done."""
    until(lambda: cpu_share(daemon.workers(), 0.2) < 0.03)


@contextlib.contextmanager
def sending(client: Client, data: bytes, *, end: bool = True) -> Iterator[None]:
    """Send in a thread of its own, as much as the daemon takes, and end."""

    def send() -> None:
        with contextlib.suppress(OSError):
            client.send(data)
            if end:
                client.end()

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()
