"""What a worker makes of messages in the channel, right and wrong, and what it logs."""

import array
import os
import socket

from integration.service import Service
from outlive.channel import SEND_END
from tcpupperd.processes.connection_format import _RECORD, VERSION
from waiting import until


def record(family: int, lines: int, host: bytes, held: int = 0, service: bytes = b"") -> bytes:
    sizes = len(host), held, 0, len(service)
    return _RECORD.pack(family, 5, 0, lines, 0, 0, 0, *sizes, 0, 0, 0) + host + service


def greeting(version: int = VERSION, count: int = 1) -> bytes:
    return b"tcpupperd\0" + bytes([0, version, 0, count])


#: Greetings, states and the sizes that the states claim to have; what is said of each, the unit
#: tests know.
INVALID = [
    (greeting(), b"", 0),
    (greeting(), b"", 2**40),
    (greeting(), record(socket.AF_INET, 1, b"127.0.0.1", 2**30), 2**40),
    (greeting(), record(60000, 2**64 - 1, b"127.0.0.1"), 0),
    (greeting(), record(socket.AF_INET6, 1, b"::1"), 0),
    (greeting(), record(socket.AF_INET, 2**64 - 1, b"127.0.0.1"), 0),
    (greeting(), record(socket.AF_INET, 1, b"nobody"), 0),
    (greeting(), record(socket.AF_INET, 1, b"127.0.0.1", service=b"of the future"), 0),
    (greeting(VERSION + 1), b"", 0),
    (greeting(count=7), b"", 0),
    (b"something else", b"", 0),
]


def test_each_invalid_message_costs_only_its_own_connection(service: Service) -> None:
    with service.daemon():
        whole = service.connect()
        assert whole.ask(b"one") == b"ONE"
    lost = [service.connect() for _ in INVALID]
    for client, (start, state, size) in zip(lost, INVALID, strict=True):
        client.send(b"not answered\n")
        request, _ = service.listener.accept()
        file = os.memfd_create("state")
        os.write(file, state)
        os.truncate(file, size or len(state))
        with request:
            rights = array.array("i", [file, request.fileno()])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            service.manager.stored[SEND_END].sendmsg([start], ancillary)
        os.close(file)
    with service.daemon() as daemon:
        assert [client.read_to_end() for client in lost] == [b""] * len(lost)
        assert whole.ask(b"two") == b"TWO"
        until(lambda: daemon.counters()["state_unreadable"] == len(INVALID))
        assert "closing 1 connection whose state cannot be restored: " in daemon.log
        assert "Traceback" not in daemon.log
        assert "starting a replacement" not in daemon.log


def test_empty_message_costs_nothing(service: Service) -> None:
    with service.daemon() as daemon:
        client = service.connect()
        assert client.ask(b"one") == b"ONE"
        for _ in range(1000):
            until(lambda: sent(service.manager.stored[SEND_END], b""))
        until(lambda: "the message is empty" in daemon.log)
        assert client.ask(b"two") == b"TWO"
        assert "Traceback" not in daemon.log
        assert daemon.log.count("the message is empty") < 100


def sent(end: socket.socket, data: bytes) -> bool:
    """Whether there was room for a message."""
    try:
        end.send(data)
    except BlockingIOError:
        return False
    return True


def test_connection_is_logged_as_handed_over_and_taken_over(service: Service) -> None:
    with service.daemon(log_level="debug") as daemon:
        client = service.connect()
        name = f"127.0.0.1:{client.port}"
        assert client.ask(b"one") == b"ONE"
        daemon.reload()
        until(lambda: f"{name}: taken over after 1 line" in daemon.log)
        until(lambda: f"{name}: handed over after 1 line" in daemon.log)
        assert daemon.log.count(f"{name}: connected") == 1
        assert f"{name}: closed" not in daemon.log
        assert client.ask(b"two") == b"TWO"
    with service.daemon(log_level="debug") as daemon:
        assert client.ask(b"three") == b"THREE"
        until(lambda: f"{name}: taken over after 2 lines" in daemon.log)
        assert "connected" not in daemon.log
