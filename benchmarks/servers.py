"""The servers to compare: starting them, pinned to a CPU, and stopping them."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from benchmarks.build import BUILD, PEERS, PYTHON, TREE, VENV_PYTHON
from tcpupperd.serving.fast_path import SWITCH

CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, LOAD_CPU = CPUS[0], CPUS[-1]

# Without settings like PYTHONDONTWRITEBYTECODE, which would make each start compile again.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("PYTHON") and name != SWITCH
}

START_SECONDS = 10
STOP_SECONDS = 15


@dataclass(frozen=True)
class Server:
    name: str
    command: tuple[str, ...]
    """With ``{port}`` for the port to listen on, on 127.0.0.1."""
    one_shot: bool = False
    """Answers only at end of input (``tr``), so only the connection rate can be measured."""
    slow: bool = False
    """So far from the others that a few rounds are enough, and without 10,000 idle connections."""

    def can_do(self, options: tuple[str, ...]) -> bool:
        """Whether it can do a workload with these options of the load generator."""
        if self.one_shot:
            return "--churn" in options and "--sources=4096" not in options
        return not (self.slow and "--idle=10000" in options)

    @property
    def missing(self) -> bool:
        return not Path(self.command[0]).exists()


@dataclass(frozen=True)
class Running:
    server: Server
    pid: int
    port: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


#: The package is measured if it is installed, otherwise this checkout.
INSTALLED = Path("/usr/sbin/tcpupperd")
PROGRAM = (str(INSTALLED),) if INSTALLED.exists() else (str(PYTHON), "-m", "tcpupperd")


def tcpupperd(*options: str) -> tuple[str, ...]:
    return (*PROGRAM, "--listen", "127.0.0.1:{port}", *options)


def measured_program() -> str:
    """What is measured, in words: its version, whether it uses C, and where it comes from."""
    version = subprocess.check_output((*PROGRAM, "--version"), cwd=TREE, env=ENVIRONMENT)
    origin = "as installed from its package" if INSTALLED.exists() else "from a checkout"
    return f"{version.decode().strip()}, {origin}"


def _python_peer(script: str, *arguments: str, python: Path = PYTHON) -> tuple[str, ...]:
    return (str(python), "-I", str(PEERS / script), "{port}", *arguments)


#: More than the default of 10,000, for the busy connections next to 10,000 idle ones.
ONE_WORKER = ("--workers", "1", "--max-connections", "11000")
DAEMON = Server("tcpupperd", tcpupperd(*ONE_WORKER))
WITHOUT_C = Server(
    "tcpupperd without its C module",
    ("/usr/bin/env", f"{SWITCH}=1", *tcpupperd(*ONE_WORKER)),
)
LIMIT = Server("C epoll", (str(BUILD / "epoll"), "{port}"))
STANDARD = Server("socketserver threads", _python_peer("threads.py"), slow=True)

SERVERS = (
    LIMIT,
    DAEMON,
    WITHOUT_C,
    Server("uvloop Protocol", _python_peer("asyncio_protocol.py", "uvloop", python=VENV_PYTHON)),
    Server("Go net", (str(BUILD / "goroutines"), "{port}")),
    Server("asyncio Protocol", _python_peer("asyncio_protocol.py")),
    Server("asyncio streams", _python_peer("asyncio_streams.py"), slow=True),
    Server("gevent StreamServer", _python_peer("gevent_server.py", python=VENV_PYTHON), slow=True),
    Server(
        "Twisted LineReceiver", _python_peer("twisted_server.py", python=VENV_PYTHON), slow=True
    ),
    STANDARD,
    Server(
        "socat forks tr",
        (
            "/usr/bin/socat",
            "TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr,backlog=4096",
            "EXEC:tr a-z A-Z",
        ),
        one_shot=True,
        slow=True,
    ),
    Server(
        "systemd Accept=yes, tr",
        (
            "/usr/bin/systemd-socket-activate",
            *("--accept", "--inetd", "--listen=127.0.0.1:{port}", "tr", "a-z", "A-Z"),
        ),
        one_shot=True,
        slow=True,
    ),
)


@contextmanager
def started(server: Server, cpus: str = str(SERVER_CPU)) -> Iterator[Running]:
    """Run ``server`` on ``cpus`` (in the syntax of taskset(1)) until the end of the block."""
    port = free_port()
    command = [argument.format(port=port) for argument in server.command]
    with TemporaryFile() as log:
        process = subprocess.Popen(
            ["/usr/bin/taskset", "--cpu-list", cpus, *command],
            cwd=TREE,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        running = Running(server, process.pid, port)
        try:
            if not _listens(running, process):
                log.seek(0)
                raise RuntimeError(f"{server.name} does not listen: {log.read().decode()}")
            yield running
        finally:
            stop(process)


def free_port() -> int:
    """A free port below those that the kernel uses for outgoing connections, proc_sys_net(5)."""
    for port in range(20000, 30000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port from 20000 to 29999")


def _listens(running: Running, process: subprocess.Popen[bytes]) -> bool:
    """Wait until it listens; False if it has exited or does not listen in time."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            running.connect().close()
            return True
        except ConnectionRefusedError:
            time.sleep(0.01)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the process, and those that it has forked into its session."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
