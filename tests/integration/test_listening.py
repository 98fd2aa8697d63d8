"""Where the daemon listens: on addresses of its own, and on sockets that are passed in."""

import contextlib
import os
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from integration.client import OWN, Client, make_socket, name_of, where
from integration.daemon import COMMAND, ROOT, Daemon
from integration.manager import Manager
from integration.processes import cannot, children, descriptors, flags
from outlive.activation import PassedError, passed_descriptors
from tools import need
from waiting import until

LOCALHOST = "127.0.0.1:0"

# Only there a process can be told from another that had its number (Linux 6.9).
KERNEL = tuple(int(number) for number in re.findall("[0-9]+", os.uname().release)[:2])
needs_pidfs = pytest.mark.skipif(KERNEL < (6, 9), reason="this kernel has no pidfs")

# Addresses of its own


def test_listens_on_all_addresses_of_a_port() -> None:
    with Daemon(listen=["0"]) as daemon:
        (bound,) = daemon.addresses
        assert bound.startswith("[::]:")
        port = bound.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            assert daemon.connect(f"{host}:{port}").ask(b"hello") == b"HELLO"


def test_listens_on_all_addresses_of_a_name() -> None:
    with Daemon(listen=["localhost:0"]) as daemon:
        found = {one[4][0] for one in socket.getaddrinfo("localhost", 0)}
        assert {address.rpartition(":")[0].strip("[]") for address in daemon.addresses} == found
        for address in daemon.addresses:
            assert daemon.connect(address).ask(b"hello") == b"HELLO"


def test_listens_on_several_addresses() -> None:
    with Daemon(listen=[LOCALHOST, LOCALHOST, "[::1]:0", f"{OWN}-test"]) as daemon:
        # One that is given twice counts once.
        assert [one.rpartition(":")[0] for one in daemon.addresses] == ["127.0.0.1", "[::1]", ""]
        for address in daemon.addresses:
            assert daemon.connect(address).ask(b"hello") == b"HELLO"


@pytest.mark.parametrize("leave", ["stop", "reload"])
def test_path_of_another_program_is_left_to_it(leave: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Daemon(listen=[str(path)]) as daemon, make_socket(str(path)) as other:
        path.unlink()
        other.bind(str(path))
        other.listen()
        if leave == "stop":
            daemon.stop()
        else:
            daemon.reload(listen=[LOCALHOST])
        with make_socket(str(path)) as client:
            client.connect(str(path))


LINK_LOCAL = """
ip link set lo up
ip link add name if-a type veth peer name if-b || exit
for name in if-a if-b; do
    ip link set dev $name up && ip address add fe80::1/64 dev $name nodad || exit
done
exec "$@"
"""


def test_interface_of_a_link_local_address_is_kept() -> None:
    need("ip")
    wrapper = ("unshare", "-rn", "sh", "-c", LINK_LOCAL, "sh")
    if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        cannot("no namespace with network interfaces can be made")
    listen = ["[fe80::1%if-a]:9997", "[fe80::1%if-b]:9997", "metrics=[fe80::1%if-b]:9998"]
    with Daemon(listen=listen, log_level="debug", wrapper=wrapper) as daemon:
        assert daemon.addresses == listen
        enter = ("nsenter", "-t", str(daemon.pid), "-U", "-n", "--preserve-credentials")

        def run(*words: str) -> str:
            return subprocess.run(
                [*enter, *words], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout

        client = (sys.executable, "-m", "tcpupperd.client", "--port=9997", "--check", "-v")
        for name in ("if-a", "if-b"):
            said = run(*client, f"--host=fe80::1%{name}", f"--bind=fe80::1%{name}")
            assert f"to [fe80::1%{name}]:9997 from [fe80::1%{name}]:" in said
            until(lambda name=name: re.search(rf"\[fe80::1%{name}]:\d+: closed", daemon.log))  # type: ignore[misc]
        fetch = (
            "import socket; s = socket.create_connection(('fe80::1%if-b', 9998));"
            "s.sendall(b'GET /metrics HTTP/1.0\\r\\n\\r\\n'); print(s.makefile().read())"
        )
        metrics = run(sys.executable, "-c", fetch)
        for address in listen[:2]:
            assert f'"{address}"' in metrics
        daemon.configure(listen=["[fe80::1]:9997"])
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "a link-local address requires its interface" in daemon.log)


def test_listens_on_a_path_which_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "upper socket"
    with Daemon("--listen", str(path)) as daemon:
        assert daemon.addresses == [str(path)]
        assert daemon.connect(str(path)).ask(b"hello") == b"HELLO"
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert not path.exists()


def test_takes_over_the_path_of_a_socket_without_a_listener(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(path)
        gone.listen()
    with Daemon(listen=[path]) as daemon:
        assert daemon.connect(path).ask(b"hello") == b"HELLO"


def test_leaves_a_path_to_one_that_lives(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with Daemon(listen=[path]) as first:
        status, log = Daemon(listen=[path]).run()
        assert status == 71
        assert f"cannot listen on {path}: Address already in use" in log
        assert first.connect(path).ask(b"hello") == b"HELLO"


def test_leaves_a_file_alone_that_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    status, log = Daemon(listen=[str(path)]).run()
    assert status == 71
    assert (
        f"cannot listen on {path}: it exists and is not a socket; use another path in listen"
        in log
    )
    assert path.read_text() == "precious"


def test_says_who_is_in_the_way() -> None:
    with Daemon() as first:
        address = first.addresses[0]
        status, log = Daemon("--listen", address).run()
        assert status == 71
        (line,) = log.splitlines()
        assert f"cannot listen on {address}: Address already in use; another program" in line


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("no-such-host.invalid:0", '"no-such-host.invalid" cannot be resolved'),
        ("192.0.2.1:0", "Cannot assign requested address; this host has no such address"),
        ("/nonexistent/socket", "No such file or directory; the directory does not exist"),
    ],
)
def test_says_why_it_cannot_listen(address: str, why: str) -> None:
    status, log = Daemon(listen=[address]).run()
    assert status == 71
    assert f"cannot listen on {address}: " in log.splitlines()[-1]
    assert why in log.splitlines()[-1]


def test_serves_ipv4_where_ipv6_is_switched_off(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n::1 localhost\n")
    need("ip")
    prepare = (
        f"mount --bind {hosts} /etc/hosts && ip link set lo up"
        " && echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"
    )
    wrapper = ("unshare", "-rnm", "sh", "-c", f'{prepare} && exec "$@"', "sh")
    if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        cannot("no namespaces without IPv6 can be made")
    with Daemon(listen=["localhost:0", "0"], wrapper=wrapper) as daemon:
        assert "localhost:0: not listening on ::1: Cannot assign requested address" in daemon.log
        assert len(daemon.addresses) == 2
        enter = ("nsenter", "-t", str(daemon.pid), "-U", "-n", "--preserve-credentials")
        for address in daemon.addresses:
            port = address.rpartition(":")[2]
            ask = (sys.executable, "-m", "tcpupperd.client", "--host=127.0.0.1", f"--port={port}")
            answer = subprocess.run(
                [*enter, *ask, "hello"], cwd=ROOT, capture_output=True, text=True, check=True
            )
            assert answer.stdout == "HELLO\n"


def test_queue_is_long() -> None:
    need("ss")
    with Daemon(listen=[LOCALHOST]) as daemon:
        shown = subprocess.run(
            ["ss", "-Hltn", f"sport = :{daemon.addresses[0].rpartition(':')[2]}"],
            capture_output=True,
            text=True,
            check=True,
        )
        limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
        assert int(shown.stdout.split()[2]) == min(4096, limit)


# Sockets passed in: the rules of sd_listen_fds(3)


@contextlib.contextmanager
def listening(address: str, backlog: int = 16) -> Iterator[socket.socket]:
    """A socket as a service manager makes it."""
    with make_socket(address) as one:
        one.bind(where(address))
        one.listen(backlog)
        yield one


def test_serves_passed_sockets_and_nothing_else(tmp_path: Path) -> None:
    addresses = (LOCALHOST, "[::1]:0", "[::]:0", str(tmp_path / "socket"), f"{OWN}-passed")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(listening(address)) for address in addresses]
        passed = [(f"name {number}", one) for number, one in enumerate(sockets)]
        with Daemon(listen=[f"{OWN}-ignored"], passed=passed) as daemon:
            assert daemon.addresses == [name_of(one) for one in sockets]
            for address in daemon.addresses:
                reachable = address.replace("[::]", "127.0.0.1")
                assert daemon.connect(reachable).ask(b"hello") == b"HELLO"
            with pytest.raises(ConnectionRefusedError):
                daemon.connect(f"{OWN}-ignored")
        assert (tmp_path / "socket").exists()


@pytest.mark.parametrize("address", [LOCALHOST, f"{OWN}-passed"], ids=["TCP", "Unix"])
def test_passed_socket_stays_as_it_was(address: str) -> None:
    with listening(address, backlog=7) as one:
        with Daemon(passed=[("name", one)]) as daemon:
            assert daemon.connect().ask(b"hello") == b"HELLO"
            assert longest_queue(one) in (7, None)
            daemon.reload()
            assert daemon.connect().ask(b"hello") == b"HELLO"
        assert longest_queue(one) in (7, None)
        # Neither shut down nor closed: a client that connects now waits for the next daemon.
        with contextlib.closing(Client(name_of(one))) as client:
            client.send(b"hello\n")
            with Daemon(passed=[("name", one)]):
                assert client.read_line() == b"HELLO\n"
                client.close()


def longest_queue(one: socket.socket) -> int | None:
    """The backlog of a TCP socket (tcpi_sacked of a listening one, tcp(7)); None of another."""
    if one.family == socket.AF_UNIX:
        return None
    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    return int(struct.unpack_from("=I", info, 28)[0])


def test_stop_leaves_the_queue_to_the_next_daemon() -> None:
    with listening(LOCALHOST) as one, Daemon(passed=[("name", one)]) as daemon:
        daemon.stop()
        waiting = daemon.connect(name_of(one))
        waiting.send(b"hello\n")
        with Daemon(passed=[("name", one)]):
            assert waiting.read_line() == b"HELLO\n"
            waiting.close()


def test_passed_sockets_are_not_inherited_by_programs() -> None:
    with listening(LOCALHOST) as one, Daemon(passed=[("name", one)]) as daemon:
        inode = f"socket:[{os.fstat(one.fileno()).st_ino}]"
        for pid in (daemon.pid, *daemon.workers()):
            (fd,) = (fd for fd, target in descriptors(pid).items() if target == inode)
            assert flags(pid, fd) & os.O_CLOEXEC


@pytest.mark.parametrize(
    "environment",
    [
        ("-u", "LISTEN_PID"),  # set for nobody
        ("LISTEN_PID=1",),  # for another process
        pytest.param(("LISTEN_PIDFDID=1",), marks=needs_pidfs),  # that had our number
    ],
)
def test_ignores_sockets_passed_to_another_process(environment: tuple[str, ...]) -> None:
    with listening(LOCALHOST) as one:
        wrapper = ("env", *environment)
        with Daemon(passed=[("name", one)], wrapper=wrapper) as daemon:
            assert daemon.addresses != [name_of(one)]
            assert daemon.connect().ask(b"hello") == b"HELLO"
            told = "are for process 1 (LISTEN_PID), but this is process "
            assert (told in daemon.log) == (environment == ("LISTEN_PID=1",))


def test_serves_sockets_passed_to_this_process_by_its_pidfd() -> None:
    identify = (
        "import os, sys; identity = os.fstat(os.pidfd_open(os.getpid())).st_ino;"
        "os.environ['LISTEN_PIDFDID'] = str(identity); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    with listening(LOCALHOST) as one:
        wrapper = (sys.executable, "-c", identify)
        with Daemon(passed=[("name", one)], wrapper=wrapper) as daemon:
            assert daemon.addresses == [name_of(one)]


@pytest.mark.parametrize("environment", [("-u", "LISTEN_FDNAMES"), ("LISTEN_FDNAMES=",)])
def test_names_are_not_needed(environment: tuple[str, ...]) -> None:
    with listening(LOCALHOST) as one:
        wrapper = ("env", *environment)
        with Daemon(passed=[("name", one)], wrapper=wrapper) as daemon:
            assert daemon.addresses == [name_of(one)]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("LISTEN_PID", "me", 'LISTEN_PID="me" is not a positive number'),
        ("LISTEN_PID", "", 'LISTEN_PID="" is not a positive number'),
        ("LISTEN_FDS", "0", 'LISTEN_FDS="0" is not a positive number'),
        ("LISTEN_FDS", "-1", 'LISTEN_FDS="-1" is not a positive number'),
        ("LISTEN_FDS", "all", 'LISTEN_FDS="all" is not a positive number'),
        ("LISTEN_FDS", "9999999999999999999", "LISTEN_FDNAMES has 1 names"),
        ("LISTEN_FDNAMES", "a:b", "LISTEN_FDNAMES has 2 names for LISTEN_FDS=1 sockets"),
        ("LISTEN_FDNAMES", "a:", "LISTEN_FDNAMES has 2 names for LISTEN_FDS=1 sockets"),
        ("LISTEN_PIDFDID", "x", 'LISTEN_PIDFDID="x" is not a positive number'),
    ],
)
def test_refuses_malformed_variables(name: str, value: str, why: str) -> None:
    good = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "name"}
    with pytest.raises(PassedError, match=why):
        passed_descriptors(good | {name: value})


def test_malformed_variable_takes_one_line() -> None:
    with listening(LOCALHOST) as one:
        status, log = Daemon(passed=[("name", one)], wrapper=("env", "LISTEN_FDS=all")).run()
    assert status == 71
    (line,) = log.splitlines()
    assert 'LISTEN_FDS="all" is not a positive number' in line


def test_descriptor_that_is_closed_is_left_out() -> None:
    with listening(LOCALHOST) as one:
        wrapper = ("env", "-u", "LISTEN_FDNAMES", "LISTEN_FDS=2")
        with Daemon(passed=[("name", one)], wrapper=wrapper) as daemon:
            assert daemon.connect().ask(b"hello") == b"HELLO"
            what = 'descriptor 4 ("unknown"), which was passed by the service manager,'
            # By then, the interpreter may have opened something else.
            because = "cannot be used: Bad file", "is not a socket and is not served"
            assert any(f"{what} {reason}" in daemon.log for reason in because)


def datagram() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def sequential() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def not_listening() -> socket.socket:
    one = socket.socket()
    one.bind(("127.0.0.1", 0))
    return one


def vsock() -> socket.socket:
    try:
        one = socket.socket(socket.AF_VSOCK)
    except OSError:
        cannot("this kernel has no vsock")
    one.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
    one.listen()
    return one


def fifo() -> FileIO:
    ours, theirs = os.pipe()
    os.close(theirs)
    return FileIO(ours)


#: What cannot be served, and the directives that have made it.
OTHERS: list[tuple[Callable[[], Any], str, str]] = [
    (datagram, "is a datagram socket", "ListenDatagram="),
    (sequential, "is a SOCK_SEQPACKET socket", "ListenSequentialPacket="),
    (not_listening, "is neither listening nor connected", "use ListenStream="),
    (vsock, "is a vsock socket", "ListenStream=vsock:"),
    (fifo, "is a FIFO", "ListenFIFO="),
]


@pytest.mark.parametrize("store", [False, True])
def test_serves_the_rest_of_what_is_passed(store: bool, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        bad = [stack.enter_context(make()) for make, *_ in OTHERS]
        good = stack.enter_context(listening(LOCALHOST))
        manager = stack.enter_context(Manager(str(tmp_path / "notify"), store=store))
        passed = [("x.socket", one) for one in (*bad, good)]
        with Daemon(passed=passed, manager=manager) as daemon:
            assert daemon.addresses == [name_of(good)]
            assert daemon.connect().ask(b"hello") == b"HELLO"
            for fd, (_, kind, directive) in enumerate(OTHERS, 3):
                (line,) = (line for line in daemon.log.splitlines() if kind in line)
                assert f'descriptor {fd} ("x.socket"), which was passed by the' in line
                assert directive in line


@pytest.mark.parametrize(("make", "kind", "directive"), OTHERS)
def test_does_not_start_without_anything_to_serve(
    make: Callable[[], Any], kind: str, directive: str
) -> None:
    with make() as bad:
        status, log = Daemon(passed=[("x.socket", bad)]).run()
    assert status == 71
    assert kind in log
    assert directive in log


def test_warns_of_a_name_without_a_meaning() -> None:
    """It looks as if this were the service."""
    with contextlib.ExitStack() as stack:
        names = ("Proxy", "x.socket", "proxy", "upper")
        passed = [(name, stack.enter_context(listening(LOCALHOST))) for name in names]
        with Daemon(passed=passed) as daemon:
            (told,) = (line for line in daemon.log.splitlines() if "is served as upper" in line)
            assert f"WARNING {name_of(passed[0][1])} is served as upper: its name is Proxy" in told
            assert "but only upper, proxy," in told
            assert "FileDescriptorName=" in told


def test_refuses_a_file() -> None:
    with listening(LOCALHOST) as one:
        wrapper = ("sh", "-c", 'exec "$@" 3</dev/null', "sh")
        status, log = Daemon(passed=[("name", one)], wrapper=wrapper).run()
    assert status == 71
    assert 'descriptor 3 ("name"), which was passed by the service manager, is not a socket' in log


def test_does_not_start_if_the_sockets_of_its_unit_are_for_another_process() -> None:
    """As with a wrapper, or with PrivatePIDs=yes. With the packaged unit, it cannot go on."""
    wrapper = ("env", "LISTEN_PID=1", "TCPUPPERD_SOCKET_UNIT=x.socket")
    with listening(LOCALHOST) as one:
        status, log = Daemon(passed=[("name", one)], wrapper=wrapper).run()
    assert status == 71
    assert "are for process 1 (LISTEN_PID), but this is process " in log


def test_variables_are_not_left_to_others(tmp_path: Path) -> None:
    """A daemon that gets this wrong would mistake its own sockets for another's on re-execution.

    Its environment in /proc is that of its start, so a module that is loaded at its end tells.
    """
    seen = tmp_path / "seen"
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, pathlib\n"
        f"seen = pathlib.Path({str(seen)!r})\n"
        "atexit.register(lambda: seen.write_text(' '.join(os.environ)))\n"
    )
    with listening(LOCALHOST) as one:
        wrapper = ("env", f"PYTHONPATH={tmp_path}")
        with Daemon(passed=[("name", one)], wrapper=wrapper):
            pass
    assert "LISTEN" not in seen.read_text()


# Connections passed in: Accept=yes


@contextlib.contextmanager
def connected(address: str) -> Iterator[tuple[Client, socket.socket]]:
    """A client, and the other end of its connection as a service manager passes it in."""
    with listening(address) as one, contextlib.closing(Client(name_of(one))) as client:
        request, _ = one.accept()
        with request:
            yield client, request


@pytest.mark.parametrize("address", [LOCALHOST, f"{OWN}-connected"], ids=["TCP", "Unix"])
def test_serves_a_connection_passed_in_and_ends(address: str) -> None:
    with (
        connected(address) as (client, request),
        Daemon(passed=[("connection", request)]) as daemon,
    ):
        request.close()
        assert not children(daemon.pid)
        assert client.ask(b"hello") == b"HELLO"
        client.send(b"bye")
        client.end()
        assert client.read_to_end() == b"BYE"
        assert daemon.wait() == 0


def test_stop_ends_a_connection_passed_in() -> None:
    with (
        connected(LOCALHOST) as (client, request),
        Daemon(passed=[("connection", request)]) as daemon,
    ):
        request.close()
        assert client.ask(b"hello") == b"HELLO"
        daemon.send_signal(signal.SIGTERM)
        assert client.read_to_end() == b""
        client.close()
        assert daemon.wait() == 0


# With systemd's own tool


def activate(*options: str) -> tuple[str, ...]:
    """systemd-socket-activate(1), which starts a command for the first connection."""
    need("systemd-socket-activate")
    keep = ("--setenv=NOTIFY_SOCKET", "--setenv=TEST_DIRECTORY")
    return ("systemd-socket-activate", *keep, *options)


def free_port() -> int:
    """One that the kernel will not choose for others in the meantime."""
    theirs = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    while True:
        port = random.randrange(1024, max(2048, int(theirs[0])))
        with contextlib.suppress(OSError), listening(f"[::]:{port}"):
            return port


@pytest.mark.parametrize(
    "forms", [["[::]:PORT"], ["DIRECTORY/socket", f"{OWN}-activated"]], ids=["TCP", "Unix"]
)
def test_socket_activation(forms: list[str], tmp_path: Path) -> None:
    port = str(free_port())
    addresses = [form.replace("PORT", port).replace("DIRECTORY", str(tmp_path)) for form in forms]
    daemon = Daemon(wrapper=activate(*(f"--listen={address}" for address in addresses)))
    daemon.knock_at = addresses[0].replace("[::]", "127.0.0.1")
    with daemon:
        assert daemon.clients[0].ask(b"first") == b"FIRST"  # it was queued before the start
        assert daemon.addresses == addresses


def test_socket_activation_for_each_connection(tmp_path: Path) -> None:
    address = f"{tmp_path}/socket"
    with Manager(f"{tmp_path}/notify") as manager:
        command = [*activate("--accept", f"--listen={address}"), *COMMAND]
        environment = {**os.environ, **manager.environment, "TEST_DIRECTORY": ""}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        ) as activator:
            try:
                assert activator.stderr
                assert activator.stderr.readline().startswith("Listening on ")
                for name in (b"one", b"two"):
                    with contextlib.closing(Client(address)) as client:
                        manager.wait("READY=1")
                        assert client.ask(name) == name.upper()
                        assert len(children(activator.pid)) == 1
                    until(lambda: not children(activator.pid))
            finally:
                activator.terminate()
