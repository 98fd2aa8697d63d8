"""The work that a line and a connection cost, counted in calls: it is the same on every machine.

How fast the daemon is, the benchmarks say. Here a change is caught that makes it do more: another
system call for each line, work for each pipelined line, another layer of calls.
"""

import contextlib
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from integration.client import Client
from integration.daemon import Daemon
from integration.embedding import connected
from integration.processes import cannot, state, stopped
from outlive.descriptors import Sharing
from tcpupperd.serving.acceptor import ACCEPTS_BEFORE_REQUEUE, ACCEPTS_PER_ITERATION
from tcpupperd.serving.fast_path import ANSWERED, RECEIVE_SIZE, fast_path, python_fast_path
from tcpupperd.serving.server import UpperServer
from tools import need
from waiting import until

LINE = b"x" * 63 + b"\n"
MANY_LINES = LINE * 256

#: Calls of epoll_wait(2) that a count may have more: in the first the worker waits while the trace
#: begins, in the last when it ends.
WAITING = 2

#: Not every machine has epoll_wait(2) itself, and in Python a turn takes a descriptor for a file.
SAME = {
    "epoll_pwait": "epoll_wait",
    "read": "recvfrom",
    "readv": "recvfrom",
    "write": "sendto",
}


def test_system_calls_of_a_line(tmp_path: Path) -> None:
    with Daemon(workers=1) as daemon:
        client = daemon.connect()
        client.ask(b"the first")
        with counted_system_calls(daemon, tmp_path) as calls:
            for _ in range(100):
                client.ask(b"hello")
    assert calls.pop("epoll_wait") <= 100 + WAITING
    assert calls == {"recvfrom": 100, "sendto": 100}


@pytest.mark.parametrize("sent", [LINE, MANY_LINES], ids=["one line", "256 lines"])
def test_system_calls_of_many_simultaneous_clients(tmp_path: Path, sent: bytes) -> None:
    with Daemon(workers=1) as daemon:
        clients = [daemon.connect() for _ in range(40)]
        for client in clients:
            client.ask(b"the first")
        with contextlib.ExitStack() as standing:
            standing.enter_context(stopped(*daemon.workers()))
            for client in clients:
                client.send(sent)
            with counted_system_calls(daemon, tmp_path) as calls:
                standing.close()
                for client in clients:
                    assert client.read(len(sent)) == sent.upper()
    assert calls.pop("epoll_wait") <= 1 + WAITING
    assert calls == {"recvfrom": 40, "sendto": 40}


def test_system_calls_of_a_connection(tmp_path: Path) -> None:
    count = 5 * ACCEPTS_BEFORE_REQUEUE
    with Daemon(workers=1) as daemon, contextlib.ExitStack() as standing:
        daemon.connect().ask(b"the first")
        standing.enter_context(stopped(*daemon.workers()))
        clients = [daemon.connect() for _ in range(count)]
        for client in clients:
            client.send(LINE)
            client.end()
        with counted_system_calls(daemon, tmp_path) as calls:
            standing.close()
            for client in clients:
                assert client.read_to_end() == LINE.upper()
    assert calls.pop("epoll_wait") <= count / ACCEPTS_PER_ITERATION + 2 + WAITING
    requeues = 2 * count // ACCEPTS_BEFORE_REQUEUE
    nobody_waits = calls.pop("accept4") - count
    assert nobody_waits <= 1
    # How long a connection was in the queue is asked again when 0.1 s have passed.
    calls.pop("getsockopt", 0)
    not_to_block = count  # FIONBIO
    assert calls.pop("ioctl") == not_to_block
    assert calls == {
        "getsockname": count,  # by which Python's socket objects see that it is one
        "epoll_ctl": count + requeues,
        "recvfrom": 2 * count,  # the line, and the end
        "sendto": count,
        "close": count,
    }


def test_functions_called_for_a_line() -> None:
    assert functions_called(LINE) <= 13


def test_functions_called_for_many_lines_are_few_more() -> None:
    assert functions_called(MANY_LINES) <= functions_called(LINE) + 5


def test_stream_that_is_cut_anywhere_stays_on_the_fast_path() -> None:
    stream = b"".join(b"%d " % number * (number % 7) + b"\n" for number in range(500))
    pieces = [stream[at : at + 71] for at in range(0, len(stream), 71)]
    with UpperServer() as server, contextlib.ExitStack() as stack:
        client, request = map(stack.enter_context, socket.socketpair())
        server.process_request(request, "")
        with counted_functions() as calls:
            for piece in pieces:
                client.sendall(piece)
                server.handle_request()
        assert client.recv(len(stream), socket.MSG_DONTWAIT) == stream.upper()
    print(calls.most_common())
    assert calls[fast_path.__name__] == len(pieces)
    assert calls.keys().isdisjoint({"socket.recv", "LineProtocol.receive"})


def test_functions_called_for_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than for a line: each hook of socketserver is a call, and so is each module that a
    connection passes. Without C, the line and the end of file take nine more."""
    monkeypatch.setattr(Sharing, "possible", False)  # another test may have forked this process
    count = 64
    with UpperServer(("127.0.0.1", 0)) as server, contextlib.ExitStack() as clients:
        for _ in range(count):
            client = clients.enter_context(connected(server))
            client.send(LINE)
            client.end()
        with counted_functions() as calls:
            server.handle_request()
            while len(server.connections):
                server.handle_request()
    print(calls.total() / count, calls.most_common())
    # Less than one more each: as time passes, deadlines are checked in between.
    assert calls.total() // count <= (82 if fast_path is python_fast_path else 71)


def test_end_by_reset_costs_no_more_than_an_end_of_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is how health checks and many clients end their connections."""
    monkeypatch.setattr(Sharing, "possible", False)  # another test may have forked this process
    by_end_of_file, by_reset = fewest_calls(Client.end), fewest_calls(Client.reset)
    print(by_end_of_file.most_common(), by_reset.most_common())
    # Less than one more each, as above.
    assert by_reset.total() < by_end_of_file.total() + ENDS
    assert "Connections._failed" not in by_reset  # which handles exceptions


#: Connections that end.
ENDS = 32


def fewest_calls(end: Callable[[Client], None]) -> Counter[str]:
    """Those of several attempts: as time passes, deadlines are checked in between."""
    return min((calls_for_ends(end) for _ in range(5)), key=Counter.total)


def calls_for_ends(end: Callable[[Client], None]) -> Counter[str]:
    """The functions that are called when many clients end, after one line each."""
    with UpperServer(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server)) for _ in range(ENDS)]
        for client in clients:
            client.send(LINE)
        while server.tally.counts[ANSWERED] < len(clients):
            server.handle_request()
        for client in clients:
            client.read(len(LINE))
            end(client)
        with counted_functions() as calls:
            while len(server.connections):
                server.handle_request()
    return calls


def test_a_turn_serves_each_client_once() -> None:
    with UpperServer() as server, contextlib.ExitStack() as stack:
        clients = []
        for sent in (MANY_LINES * 8, LINE):
            client, request = map(stack.enter_context, socket.socketpair())
            server.process_request(request, "")
            client.sendall(sent)
            clients.append(client)
        bulk, small = clients
        server.handle_request()
        assert small.recv(len(LINE) + 1, socket.MSG_DONTWAIT) == LINE.upper()
        # The other one has had its share, and the rest of its lines wait.
        assert len(bulk.recv(len(MANY_LINES * 8), socket.MSG_DONTWAIT)) == RECEIVE_SIZE


def functions_called(sent: bytes) -> float:
    """How many functions are called to answer what a client sent, its share of the turn
    included."""
    count = 32
    with UpperServer() as server, contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            client, request = map(stack.enter_context, socket.socketpair())
            server.process_request(request, "")
            client.sendall(sent)
            clients.append(client)
        with counted_functions() as calls:
            server.handle_request()
        for client in clients:
            assert client.recv(len(sent), socket.MSG_DONTWAIT) == sent.upper()
    print(calls.total() / count, calls.most_common())
    return calls.total() / count


@contextlib.contextmanager
def counted_functions() -> Iterator[Counter[str]]:
    """A context in which the functions that this thread calls are counted by name, Python's and
    those written in C."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, function: object) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            calls[getattr(function, "__qualname__", "?")] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)
        del calls["setprofile"]


@contextlib.contextmanager
def counted_system_calls(daemon: Daemon, directory: Path) -> Iterator[Counter[str]]:
    """A context in which the system calls of the only worker are counted by name, from one time
    that it has nothing to do to the next (strace(1)); the counts are there when it ends."""
    [worker] = daemon.workers()
    summary = directory / "calls"
    command = ["strace", "-c", "-U", "calls,name", "-o", str(summary), f"-p{worker}"]
    need("strace")
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    calls: Counter[str] = Counter()
    with tracer:
        assert tracer.stderr
        said = tracer.stderr.readline()
        if "attached" not in said:
            tracer.wait()
            cannot(f"strace: {said}")
        try:
            yield calls
            until(lambda: state(worker) == "S")
        finally:
            tracer.send_signal(signal.SIGINT)
    for row in summary.read_text().splitlines():
        number, _, name = row.strip().partition(" ")
        if number.isdigit():
            calls[SAME.get(name.strip(), name.strip())] += int(number)
    del calls["total"]
    # More memory is allocated from time to time, but not allocated, freed and allocated again for
    # each line.
    assert sum(calls.pop(name, 0) for name in ("brk", "mmap", "munmap")) < 8
