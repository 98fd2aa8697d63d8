"""The load generator itself: it must see every fault that it is there to find."""

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE

from load.clients import Clients
from system.container import Container
from waiting import until

# Answers rightly, but for one fault when a connection brings something for the second time.
SERVER = """
import socket, struct, sys, threading, time
fault = sys.argv[1]

def serve(connection):
    try:
        answer(connection)
    except OSError:  # clients hang up on a wrong answer
        connection.close()

def answer(connection):
    times, held = 0, b""
    while data := connection.recv(65536):
        times += 1
        if times == 2 and fault == "wrong":
            data = b"?" + data[1:]
        if times == 2 and fault == "silence":
            time.sleep(2)
        if times == 2 and fault in ("reset", "ended"):
            break
        lines, newline, held = (held + data).rpartition(b"\\n")
        connection.sendall((lines + newline).upper())
    if not data:
        connection.sendall(held.upper())
    elif fault == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    else:
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    connection.close()

with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
    print(listener.getsockname()[1], flush=True)
    while fault != "refused":
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


def test_clients_see_every_fault(bare_machine: Container, program: str) -> None:
    with at_work(bare_machine, program, "none") as clients:
        until(lambda: clients.report().bytes > 100_000)
        assert clients.finish().faults == {}
    for fault in ("wrong", "reset", "ended", "refused"):
        with at_work(bare_machine, program, fault) as clients:
            until(lambda: getattr(clients.report(), fault) > 50)  # noqa: B023
            faults = clients.report().faults
            # If a client sends twice after a reset, EPIPE hides it: an end, which is a fault, too.
            assert faults.keys() - {"ended"} == {fault} - {"ended"}, faults
    with at_work(bare_machine, program, "silence") as clients:
        until(lambda: clients.report().silence >= 2)
    with at_work(bare_machine, program, "ended") as clients:
        until(lambda: clients.mark().lost > 0)
    # The server neither greets nor knows what a header is.
    for option in ("--greeting=220 ready", "--header=PROXY UNKNOWN"):
        with at_work(bare_machine, program, "none", option) as clients:
            until(lambda: clients.report().wrong > 50)


@contextmanager
def at_work(machine: Container, program: str, fault: str, *options: str) -> Iterator[Clients]:
    """Clients of a server that has a fault."""
    words = (program, "--connections=500", "--round=0.5", *options)
    with machine.popen("python3", "-c", SERVER, fault, stdout=PIPE) as server:
        assert server.stdout
        port = int(server.stdout.readline())
        with machine.popen(*words, f"--port={port}", stdin=PIPE, stdout=PIPE) as process:
            try:
                yield Clients(process)
            finally:
                process.kill()
                server.kill()
