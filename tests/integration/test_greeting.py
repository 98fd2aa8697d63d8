"""`greeting`: who serves a client, said once, before anything else."""

import os
import socket

from integration.client import OWN, Client
from integration.daemon import Daemon
from integration.service import Service
from waiting import until

TEMPLATE = "{host}/{instance}/{worker} serves {client}"


def greeting(daemon: Daemon, client: str) -> bytes:
    """What TEMPLATE becomes where there is one worker."""
    [worker] = daemon.workers()
    return f"{socket.gethostname()}/tcpupperd/{worker} serves {client}\n".encode()


def test_each_client_is_greeted() -> None:
    with Daemon(workers=1, greeting=TEMPLATE) as daemon:
        for _ in range(2):
            client = daemon.connect()
            assert client.read_line() == greeting(daemon, f"127.0.0.1:{client.port}")
            assert client.ask(b"hello") == b"HELLO"


def test_client_that_the_proxy_protocol_introduces_is_greeted_by_its_own_address() -> None:
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 9999\r\n"
    with Daemon(workers=1, listen=["proxy=127.0.0.1:0"], greeting=TEMPLATE) as daemon:
        where = daemon.addresses[0].removeprefix("proxy=")
        for data, answer in ((b"", b""), (b"hello\n", b"HELLO\n")):
            client = daemon.connect(where)
            client.send(header + data)
            client.end()
            assert client.read_to_end() == greeting(daemon, "192.0.2.1:1234") + answer


def test_agent_does_not_greet() -> None:
    with Daemon(listen=["agent=127.0.0.1:0"], greeting=TEMPLATE) as daemon:
        client = daemon.connect(daemon.addresses[0].removeprefix("agent="))
        assert client.read_to_end() == b"up 100%\n"


def test_no_client_is_greeted_twice(service: Service) -> None:
    with service.daemon(workers=1, greeting=TEMPLATE) as daemon:
        client = service.connect()
        said = greeting(daemon, f"127.0.0.1:{client.port}")
        assert client.read_line() == said
        before = daemon.workers()
        daemon.reload()
        until(lambda: not set(daemon.workers()) & set(before))
        assert client.ask(b"reloaded") == b"RELOADED"
    queued = service.connect()
    with service.daemon(workers=1, greeting=TEMPLATE) as daemon:
        assert client.ask(b"restarted") == b"RESTARTED"
        assert queued.read_line() == greeting(daemon, f"127.0.0.1:{queued.port}")


def test_greeting_is_in_utf_8_whatever_the_locale() -> None:
    ascii_only = ("env", "LC_ALL=C", "PYTHONCOERCECLOCALE=0", "PYTHONUTF8=0")
    with Daemon(workers=1, greeting="Grüße von {worker} →", wrapper=ascii_only) as daemon:
        [worker] = daemon.workers()
        assert daemon.connect().read_line() == f"Grüße von {worker} →\n".encode()


def test_greeting_names_the_file_of_the_configuration() -> None:
    daemon = Daemon(greeting="{instance}")
    os.rename(daemon.config, daemon.directory / "7777.toml")
    daemon.command[daemon.command.index(str(daemon.config))] = str(daemon.directory / "7777.toml")
    with daemon:
        assert daemon.connect().read_line() == b"7777\n"


def test_local_client_is_greeted_too() -> None:
    address = f"{OWN}-greeting"
    with Daemon(listen=[address], greeting="{client}") as daemon:
        client = Client(daemon.addresses[0])
        try:
            assert client.read_line() == b"local client\n"
        finally:
            client.close()
