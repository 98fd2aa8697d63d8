"""How far `UpperServer` and the handlers are what `socketserver` promises of their like."""

import contextlib
import importlib
import os
import re
import select
import signal
import socket
import socketserver
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from integration.client import Client
from integration.embedding import ANY_PORT, address_of, connected, serving
from integration.processes import cannot, cpu_time, descriptors
from tcpupperd import ChunkHandler, Config, UpperHandler, UpperServer
from tcpupperd.words import written
from waiting import DEADLINE, until

ROOT = Path(__file__).parents[2]
ONE_LINE = Config(lines_per_connection=1)


class UpperTCPServer(UpperServer):
    address_family = socket.AF_INET


class UpperUnixServer(UpperServer):
    address_family = socket.AF_UNIX


# The tests of Python's own


@pytest.fixture
def pythons_tests(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Python's tests of `socketserver`, with a text that upper-casing leaves as it is."""
    try:
        tests = importlib.import_module("test.test_socketserver")
    except ImportError:
        cannot("Python's own tests are not installed (Debian: libpython3-testsuite)")
    monkeypatch.setattr(tests, "TEST_STR", b"HELLO WORLD\n")
    return tests


def run_case(tests: ModuleType, case: type, name: str) -> None:
    """Run one of Python's test methods, in a case that may be a variation of its own."""
    result = unittest.TestResult()
    case(name).run(result)
    problems = [text for _, text in (*result.errors, *result.failures, *result.skipped)]
    assert not problems, "\n".join(problems)
    assert result.testsRun == 1


def serving_upper_handler(tests: ModuleType) -> type:
    """Python's case, with this package's handler in place of the one that it creates."""

    class Case(tests.SocketServerTest):  # type: ignore[misc, name-defined]
        def make_server(self, addr: Any, svrcls: Any, hdlrbase: Any) -> Any:
            # A forked child has the client's socket, too, and would never see its end.
            server = type("MyServer", (svrcls,), {"config": ONE_LINE})(addr, UpperHandler)
            assert server.server_address == server.socket.getsockname()
            return server

    return Case


@pytest.mark.parametrize(
    "name",
    [
        "test_TCPServer",
        "test_ThreadingTCPServer",
        "test_ForkingTCPServer",
        "test_UnixStreamServer",
        "test_ThreadingUnixStreamServer",
        "test_ForkingUnixStreamServer",
    ],
)
# Since 3.12, Python itself warns about forking in a process with threads.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_upper_handler_passes_pythons_tests_in_pythons_servers(
    pythons_tests: ModuleType, name: str
) -> None:
    run_case(pythons_tests, serving_upper_handler(pythons_tests), name)


@pytest.mark.parametrize(
    "name",
    [
        "test_TCPServer",
        "test_UnixStreamServer",
        "test_shutdown",
        "test_tcpserver_bind_leak",
        "test_context_manager",
    ],
)
def test_upper_server_passes_pythons_tests(
    pythons_tests: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = serving_upper_handler(pythons_tests)
    monkeypatch.setattr(socketserver, "TCPServer", UpperTCPServer)
    monkeypatch.setattr(socketserver, "UnixStreamServer", UpperUnixServer)
    monkeypatch.setattr(socketserver, "StreamRequestHandler", UpperHandler)
    run_case(pythons_tests, case, name)


def test_upper_server_passes_pythons_test_of_verify_request(
    pythons_tests: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socketserver, "TCPServer", UpperTCPServer)
    monkeypatch.setattr(socketserver, "StreamRequestHandler", UpperHandler)
    name = "test_shutdown_request_called_if_verify_request_false"
    run_case(pythons_tests, pythons_tests.MiscTestCase, name)


# The handlers in Python's servers


@contextlib.contextmanager
def standard(kind: type, handler: type, config: Config | None = None) -> Iterator[Client]:
    """A client of one of Python's servers."""
    kind = type("Server", (kind,), {"daemon_threads": True, "config": config})
    with serving(kind(ANY_PORT, handler)) as server:
        client = Client(written(server.server_address))
        with contextlib.closing(client):
            yield client


KINDS = [socketserver.TCPServer, socketserver.ThreadingTCPServer]


@pytest.mark.parametrize("kind", KINDS)
def test_upper_handler_answers_all_lines(kind: type) -> None:
    with standard(kind, UpperHandler) as client:
        assert client.ask(b"one") == b"ONE"
        client.send(b"two\nthr")
        assert client.read_line() == b"TWO\n"
        client.end()
        assert client.read_to_end() == b"THR"


@pytest.mark.parametrize("kind", KINDS)
def test_upper_handler_obeys_the_servers_configuration(kind: type) -> None:
    with standard(kind, UpperHandler, Config(lines_per_connection=1, max_line=5)) as client:
        client.send(b"longer than that")
        assert client.read(16) == b"LONGER THAN THAT"
        client.send(b"\nsecond\n")
        assert client.read_to_end() == b"\n"


@pytest.mark.parametrize("kind", KINDS)
def test_chunk_handler_answers_whatever_comes(kind: type) -> None:
    with standard(kind, ChunkHandler, Config(lines_per_connection=2)) as client:
        client.send(b"no newline")
        assert client.read(10) == b"NO NEWLINE"
        client.send(b"\n")
        assert client.read_to_end() == b"\n"


# What UpperServer serves, and what it refuses


def test_chunk_handler_sets_the_framing() -> None:
    with serving(UpperServer(ANY_PORT, ChunkHandler)) as server, connected(server) as client:
        assert server.RequestHandlerClass is ChunkHandler
        client.send(b"no newline")
        assert client.read(10) == b"NO NEWLINE"


def test_configured_framing_sets_the_handler() -> None:
    with UpperServer(config=Config(framing="none")) as server:
        assert server.RequestHandlerClass is ChunkHandler
    with UpperServer() as server:
        assert server.RequestHandlerClass is UpperHandler


class Renamed(UpperHandler):
    """Does what its parent does."""


class Other(UpperHandler):
    """Does something else."""

    def handle(self) -> None:
        raise AssertionError


def test_other_handlers_are_refused_with_the_remedy() -> None:
    UpperServer(RequestHandlerClass=Renamed).server_close()
    before = descriptors(os.getpid())
    for handler in (Other, socketserver.StreamRequestHandler, socketserver.BaseRequestHandler):
        with pytest.raises(TypeError, match=f"not {handler.__name__}.*ThreadingTCPServer"):
            UpperServer(ANY_PORT, handler)
    assert descriptors(os.getpid()) == before


@pytest.mark.parametrize("mix_in", [socketserver.ThreadingMixIn, socketserver.ForkingMixIn])
def test_mix_ins_are_rejected_with_the_remedy(mix_in: type) -> None:
    with pytest.raises(TypeError, match="remove the mix-in"):
        type("Mixed", (mix_in, UpperServer), {})


# The hooks


class Recording(UpperServer):
    """Notes which hooks are called, in order."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.calls: list[str] = []
        super().__init__(*arguments, **options)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.calls.append("verify_request")
        return super().verify_request(request, client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.calls.append("process_request")
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.calls.append("finish_request")
        super().finish_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.calls.append("shutdown_request")
        super().shutdown_request(request)

    def close_request(self, request: Any) -> None:
        self.calls.append("close_request")
        super().close_request(request)

    def handle_timeout(self) -> None:
        self.calls.append("handle_timeout")


BEGIN = ["verify_request", "process_request", "finish_request"]
HOOKS = [*BEGIN, "shutdown_request", "close_request"]


def test_hooks_are_called_in_the_order_of_the_standard_library() -> None:
    with serving(Recording(ANY_PORT)) as server:
        with connected(server) as client:
            assert client.ask(b"hello") == b"HELLO"
            assert server.calls == BEGIN
        until(lambda: server.calls == HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_exception_in_a_hook_costs_its_own_connection_only(
    hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    armed: list[bool] = []
    failed: list[Any] = []

    def fail_once(self: Recording, request: Any, *arguments: Any) -> Any:
        if armed and not failed:
            failed.append(request)
            raise ZeroDivisionError
        return getattr(Recording, hook)(self, request, *arguments)

    kind = type("Failing", (Recording,), {hook: fail_once})
    with serving(kind(ANY_PORT)) as server, connected(server) as other:
        assert other.ask(b"before") == b"BEFORE"
        armed.append(True)
        with connected(server) as client:
            with contextlib.suppress(OSError):
                client.send(b"hello\n")
                client.end()
            until(lambda: failed)
        assert other.ask(b"after") == b"AFTER"
        until(lambda: "ZeroDivisionError" in caplog.text)
        until(lambda: len(server.connections) <= 1)
    for request in failed:
        request.close()


def test_handle_timeout_is_called_when_nothing_comes() -> None:
    with Recording(ANY_PORT) as server:
        server.timeout = 0.05
        server.handle_request()
        assert server.calls == ["handle_timeout"]
        with connected(server):
            server.handle_request()
            assert server.calls[1:] == BEGIN


def test_handle_timeout_is_not_called_when_something_is_ready_at_that_time() -> None:
    never = Config(idle_timeout=0.0, line_timeout=0.0, write_timeout=0.0)
    with Recording(ANY_PORT, config=never) as server, connected(server):
        server.timeout = 0
        assert select.select([server], [], [], DEADLINE)[0]
        server.handle_request()
        assert server.calls == BEGIN
        assert server.poller.timeout() is None


def test_backlog_and_reuse_of_an_address_are_the_classs() -> None:
    class Small(UpperServer):
        request_queue_size = 3
        allow_reuse_address = False

    # Of a listening socket, TCP_INFO of tcp(7) gives the backlog as tcpi_sacked.
    with Small(ANY_PORT) as server:
        assert server.socket
        information = server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert int.from_bytes(information[28:32], sys.byteorder) == 3
        assert not server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    with UpperServer(ANY_PORT) as usual:
        assert usual.socket
        assert usual.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


# Ends


def test_close_does_not_wait_for_a_silent_client() -> None:
    """A gentle end gives a new client a second to speak; a program that closes has no time."""
    with UpperServer(ANY_PORT) as server, connected(server) as client:
        server.handle_request()
        assert len(server.connections) == 1
        waits: list[None] = []
        wait = server.poller.wait
        server.poller.wait = lambda _: waits.append(None) or wait()  # type: ignore
        server.server_close()
        assert len(waits) <= 2
        assert client.read_to_end() == b""


def test_close_twice_and_shutdown_after_it_touch_nothing_of_others() -> None:
    server = UpperServer(ANY_PORT)
    server.server_close()
    reader, writer = os.pipe()  # they get the numbers that the server had
    strangers = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    try:
        server.server_close()
        server.shutdown()
        for fd in (reader, writer, *strangers):
            os.fstat(fd)
        assert not select.select([reader, *strangers], [], [], 0)[0]
    finally:
        for fd in (reader, writer, *strangers):
            os.close(fd)


FORKING = """
import os, signal, sys, threading
from tcpupperd import UpperServer
with UpperServer(("127.0.0.1", 0)) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            signal.pause()
        print(child, flush=True)
    os.kill(child, signal.SIGKILL)
    server.shutdown()
"""


@pytest.mark.parametrize("ends", ["client", "server"])
def test_connection_ends_although_a_forked_process_has_it_open(ends: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FORKING],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        client = Client(f"127.0.0.1:{process.stdout.readline().strip()}")
        assert client.ask(b"hello") == b"HELLO"
        process.stdin.write("fork\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        try:
            if ends == "client":
                client.end()
                assert client.read_to_end() == b""
                before = cpu_time(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)  # what is measured, not a wait
                assert cpu_time(process.pid) - before < 0.25
            process.stdin.close()
            process.wait(DEADLINE)
            if ends == "server":
                assert client.read_to_end() == b""
        finally:
            client.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


# Import


def test_public_names_come_without_the_daemon() -> None:
    program = (
        "import sys, tcpupperd; names = [getattr(tcpupperd, name) for name in tcpupperd.__all__];"
        "assert not {'tcpupperd.cli', 'tcpupperd.processes', 'argparse'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-S", "-c", program], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = importlib.import_module("tcpupperd").nothing


def test_address_is_written_alike_everywhere() -> None:
    with UpperServer(ANY_PORT) as server:
        assert address_of(server) == written(server.server_address)


README_EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
BEFORE_ITS_BODY, WITH, ITS_BODY = README_EXAMPLE.partition(" as client:\n")


@pytest.fixture(params=["", "::1 localhost\n"], ids=["as it is", "only IPv6"])
def resolving(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The beginning of a command that runs with its own /etc/hosts."""
    if not request.param:
        return []
    hosts = tmp_path / "hosts"
    hosts.write_text(request.param)
    prepare = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    wrapper = ["unshare", "-rm", "sh", "-c", prepare, "sh"]
    if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        cannot("no namespace with its own /etc/hosts can be made")
    return wrapper


@pytest.mark.parametrize(
    "body", [ITS_BODY, "        raise ZeroDivisionError", "        talk(client)"]
)
def test_readme_example_ends_however_its_body_ends(body: str, resolving: list[str]) -> None:
    """Right away, and also while a client is connected that says nothing."""
    talk = (
        "def talk(client):\n"
        "    client.settimeout(10)\n"
        "    client.sendall(b'hello\\n')\n"
        "    print(client.recv(100))\n"
        "    clients.append(client.dup())\n"
        "clients = []\n"
    )
    done = subprocess.run(
        [*resolving, sys.executable, "-c", talk + BEFORE_ITS_BODY + WITH + body],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    if "raise" in body:
        assert done.stderr.endswith("ZeroDivisionError\n")
        assert done.returncode == 1
    else:
        told = "b'HELLO\\n'\n" if "talk" in body else ""
        assert (done.returncode, done.stdout, done.stderr) == (0, told, "")
