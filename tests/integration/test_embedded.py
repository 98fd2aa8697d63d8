"""A server that another program embeds: its forks, its signal handlers, and its hooks."""

import gc
import os
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from integration.client import Client, make_socket, where
from integration.embedding import ANY_PORT, address_of, connected, endpoint_of, serving
from integration.processes import descriptors
from tcpupperd import Config, UpperServer
from tcpupperd.host.sockets import Listener
from tcpupperd.serving.counters import RESET, SOURCE_LIMIT
from waiting import DEADLINE, until

ROOT = Path(__file__).parents[2]


def run(program: str, *arguments: str) -> str:
    """Run a Python program to its end; what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# Forks

CHILD_CLOSES = """
import os, socket, sys, threading
from tcpupperd import UpperServer

def connect():
    client = socket.socket(server.socket.family)
    client.settimeout(10)
    client.connect(server.socket.getsockname())
    return client

def ask(client):
    client.sendall(b"hello\\n")
    return client.recv(100)

with UpperServer(sys.argv[1] or ("127.0.0.1", 0)) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    early = connect()
    print(ask(early))
    if child := os.fork():
        print(os.waitpid(child, 0)[1], ask(early), ask(connect()))
    elif sys.argv[2] == "shutdown":
        server.shutdown()
    elif sys.argv[2] == "close":
        server.server_close()
if not child:
    os._exit(0)
"""


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("ends", ["close", "shutdown", "leaves the block"])
def test_forked_child_that_closes_leaves_the_server_as_it_is(
    local: bool, ends: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket") if local else ""
    assert run(CHILD_CLOSES, path, ends) == "b'HELLO\\n'\n0 b'HELLO\\n' b'HELLO\\n'\n"


CHILD_SERVES = """
import os, socket, sys
from tcpupperd import UpperServer

with UpperServer(sys.argv[1]) as server:
    child = os.fork()
    if not child:
        server.serve_forever()
if child:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(sys.argv[1])
    client.sendall(b"hello\\n")
    print(client.recv(100))
    os.kill(child, 9)
    os.waitpid(child, 0)
"""


def test_server_may_be_left_to_a_forked_child(tmp_path: Path) -> None:
    """As a program does that binds first, and then goes to the background."""
    assert run(CHILD_SERVES, str(tmp_path / "socket")) == "b'HELLO\\n'\n"


@pytest.mark.parametrize("address", ["127.0.0.1:0", "@tcpupperd-shared"])
def test_close_does_not_stop_a_socket_that_was_given(address: str) -> None:
    with make_socket(address) as listening:
        listening.bind(where(address))
        listening.listen()
        with serving(UpperServer(listeners=[Listener(listening.dup())])) as server:
            name = address_of(server)
        client = Client(name)
        accepted, _ = listening.accept()
        accepted.close()
        client.close()


# Signal handlers

INTERRUPTED = """
import signal, threading
from tcpupperd import UpperServer

def end(*_):
    global count
    count += 1
    server.shutdown()

def serve():
    while count < 200:
        server.serve_forever()

count = 0
signal.signal(signal.SIGALRM, end)
with UpperServer(("127.0.0.1", 0)) as server:
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    while count < 200:
        server.CALL()
    signal.setitimer(signal.ITIMER_REAL, 0)
    server.shutdown()
    thread.join()
"""


@pytest.mark.parametrize("call", ["poller.wake", "shutdown"])
def test_signal_handler_can_shut_the_server_down(call: str) -> None:
    """Whatever it interrupts, which may be another call that does the same."""
    run(INTERRUPTED.replace("CALL", call))


# Hooks


def test_hook_may_close_other_connections_that_are_due() -> None:
    class Closing(UpperServer):
        def close_request(self, request: Any) -> None:
            super().close_request(request)
            for connection in self.connections:
                self.connections.close(connection)

    config = Config(lines_per_connection=1)
    with serving(Closing(ANY_PORT, config=config)) as server:
        clients = [Client(address_of(server)) for _ in range(16)]
        until(lambda: len(server.connections) == len(clients))
        for client in clients:
            assert client.ask(b"hello") == b"HELLO"
        until(lambda: not server.connections)  # they lingered together
        for client in clients:
            client.close()
        with connected(server) as client:
            assert client.ask(b"after") == b"AFTER"


def test_hook_may_close_the_server() -> None:
    class Single(UpperServer):
        def close_request(self, request: Any) -> None:
            super().close_request(request)
            self.server_close()

    before = descriptors(os.getpid())
    server = Single(ANY_PORT)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    with connected(server) as client:
        thread.start()
        assert client.ask(b"hello") == b"HELLO"
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert descriptors(os.getpid()) == before


def test_hook_may_close_the_connection_of_a_client_that_it_verifies() -> None:
    class Closing(UpperServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            verified = super().verify_request(request, client_address)
            if connection := self.connections.of(request):
                self.connections.close(connection)
            return verified

    config = Config(max_connections_per_source=1, proxy_from=["127.0.0.1"])
    listener = Listener(socket.create_server(ANY_PORT), "proxy")
    with serving(Closing(listeners=[listener], config=config)) as server:
        for _ in range(2):
            with connected(server) as client:
                client.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nhello\n")
                client.wait_for_end()
        assert (len(server.connections), len(server.connections.sources)) == (0, 0)
        assert server.tally.numbers[RESET] == server.tally.numbers[SOURCE_LIMIT] == 0


class Deferring(UpperServer):
    """Begins to serve connections at the end of the loop iteration in which they came."""

    def __init__(self, **options: Any) -> None:
        self.deferred: list[tuple[Any, Any]] = []
        super().__init__(**options)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.deferred.append((request, client_address))

    def service_actions(self) -> None:
        super().service_actions()
        while self.deferred and len(self.deferred) == len(self.acceptor.listeners):
            for one in self.deferred:
                super().process_request(*one)
            self.deferred.clear()


def test_connection_that_a_hook_defers_gets_the_service_of_its_listener() -> None:
    names = ("metrics", "upper", "agent")
    listeners = [Listener(socket.create_server(ANY_PORT), name) for name in names]
    with serving(Deferring(listeners=listeners)):
        metrics, upper, agent = (
            socket.create_connection(one.socket.getsockname(), DEADLINE) for one in listeners
        )
        for client in (metrics, upper):
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert metrics.recv(15) == b"HTTP/1.1 200 OK"
        assert upper.recv(25) == b"GET /METRICS HTTP/1.0\r\n\r\n"
        assert agent.recv(9) == b"up 100%\n"
        for client in (metrics, upper, agent):
            client.close()


# What is left


def test_server_that_is_never_closed_leaves_no_descriptor() -> None:
    gc.collect()
    before = descriptors(os.getpid())
    server = UpperServer(ANY_PORT)
    with connected(server) as client:
        assert select.select([server], [], [], DEADLINE)[0]
        server.handle_request()
        client.send(b"hello\n")
    del server
    with pytest.warns(ResourceWarning, match="unclosed <socket"):
        gc.collect()
    assert descriptors(os.getpid()) == before


def _try_to_make(listeners: list[Listener]) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        UpperServer(ANY_PORT, listeners=listeners)
    gc.collect()


def test_server_that_cannot_be_made_leaves_no_descriptor() -> None:
    gc.collect()
    before = descriptors(os.getpid())
    closed = Listener(socket.create_server(ANY_PORT))
    closed.socket.close()
    with pytest.warns(ResourceWarning, match="unclosed <socket"):
        _try_to_make([closed])
    assert descriptors(os.getpid()) == before


# Its address


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", ""])
def test_clients_can_connect_to_its_server_address(host: str) -> None:
    with serving(UpperServer((host, 0))) as server:
        assert server.server_address == endpoint_of(server)
        with socket.create_connection(server.server_address, DEADLINE) as client:
            client.sendall(b"hello\n")
            assert client.recv(100) == b"HELLO\n"
