"""`tcpupper --ping` with a daemon that is reloaded, restarted and killed, and with servers that do
not answer, or wrongly."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.daemon import Daemon
from integration.processes import stopped
from integration.service import Service
from integration.tcpupper import (
    CLIENT,
    PIPE,
    ROOT,
    assert_still_running,
    full_queue,
    nobody,
    reset_at_close,
    run,
    run_behind_full_queue,
    serving,
    started,
    stay_silent,
    upper_all,
)
from waiting import DEADLINE, until

#: Seconds in which a busy machine does what must be done before the next line, or in time.
PATIENCE = 3

#: As many as a restart may take there.
LONG = ["--timeout", str(DEADLINE)]

COUNTS = re.compile(
    r"([0-9]+) sent, ([0-9]+) answered, ([0-9]+) lost \([0-9.]+ %\), ([0-9]+) wrong,"
    r" [0-9]+ disconnected, ([0-9]+) reconnected(?:, longest gap ([0-9.]+ m?s))?"
)


class Ping:
    """A ping that runs, and what it has printed so far."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def text(self) -> str:
        return self._output.read_text()

    def shows(self, pattern: str) -> str:
        """Wait for a line that matches."""
        return until(lambda: re.search(f"^{pattern}$", self.text, re.M))[0]

    def counts(self) -> list[int]:
        """The counts so far, as SIGQUIT shows them."""
        shown = len(COUNTS.findall(self.text))
        self.process.send_signal(signal.SIGQUIT)
        return until(lambda: counts(self.text, shown))

    def go_on(self) -> None:
        """Wait for the answers to many lines that are not yet sent."""
        sent = self.counts()[0]
        until(lambda: self.counts()[1] > sent + 40)

    def end(self, number: int = signal.SIGINT) -> int:
        """End it by a signal; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)


def counts(text: str, which: int = 0) -> list[int]:
    """Sent, answered, lost, wrong, reconnected; [] if they are not shown."""
    found = COUNTS.findall(text)
    return [int(number) for number in found[which][:5]] if len(found) > which else []


def longest_gap(text: str) -> float:
    """Seconds."""
    number, unit = COUNTS.findall(text)[-1][5].split()
    return float(number) / {"s": 1, "ms": 1000}[unit]


@contextlib.contextmanager
def pinging(output: Path, *arguments: str) -> Iterator[Ping]:
    with output.open("wb") as file, started("--ping", *arguments, stdout=file.fileno()) as process:
        until(lambda: output.read_bytes().startswith(b"PING "))  # from when on it takes signals
        yield Ping(process, output)


def place(address: str) -> list[str]:
    host, _, port = address.rpartition(":")
    return ["--host", host, "--port", port]


# What is shown


def test_each_answer_is_shown_and_the_run_summed_up() -> None:
    with Daemon() as daemon:
        address = daemon.addresses[0]
        done = run("--ping", *place(address), "-c", "3", "-i", "0.01")
    first, *lines, name, summary, times = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr) == (0, b"")
    assert first == f"PING {address}: a line every 0.01 s"
    assert len(lines) == 3
    for seq, line in enumerate(lines, 1):
        assert re.fullmatch(rf"seq={seq} time=[0-9.]+ ms", line)
    assert name == f"--- {address} ping statistics ---"
    assert counts(summary) == [3, 3, 0, 0, 0]
    assert re.fullmatch(r"time min/avg/max/p99 = ([0-9.]+/){3}[0-9.]+ ms", times)
    # The time between two lines is no gap.
    longest_time = float(times.split("/")[-2]) / 1000
    assert 0 < longest_gap(summary) <= 1.01 * longest_time


def test_quiet() -> None:
    with serving(upper_all) as server:
        done = run("--ping", *server, "-q", "-c", "2", "-i", "0.01")
    first, name, summary, _ = done.stdout.decode().splitlines()
    assert first.startswith("PING ")
    assert name.startswith("---")
    assert counts(summary) == [2, 2, 0, 0, 0]


def test_every_connection_has_its_turns() -> None:
    many = 300
    with Daemon() as daemon:
        arguments = ["--connections", str(many), "-c", "3", "-i", "0.1"]
        done = run("--ping", *place(daemon.addresses[0]), *arguments)
        assert daemon.counters()["accepted"] == many
    shown = re.findall(r"^connection=([0-9]+) seq=([0-9]+) ", done.stdout.decode(), re.M)
    expected = {(str(one + 1), seq) for one in range(many) for seq in "123"}
    assert sorted(shown) == sorted(expected)
    assert counts(done.stdout.decode()) == [3 * many, 3 * many, 0, 0, 0]
    assert done.returncode == 0


def test_verbose_shows_the_address() -> None:
    with serving(upper_all) as server:
        done = run("--ping", *server, "-v", "-c", "1")
    address = f"127.0.0.1:{server[3]}"
    pattern = rf"^connected to {address} from 127\.0\.0\.1:[0-9]+$"
    assert re.search(pattern, done.stdout.decode(), re.M)


def test_unix_socket(tmp_path: Path) -> None:
    with Daemon(listen=[str(tmp_path / "socket")]):
        done = run("--ping", "--unix", str(tmp_path / "socket"), "-v", "-c", "2", "-i", "0.01")
    assert f"\nconnected to {tmp_path}/socket\n" in done.stdout.decode()
    assert counts(done.stdout.decode()) == [2, 2, 0, 0, 0]


def test_answers_in_pieces_are_right() -> None:
    def answer_byte_by_byte(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(7):
            for byte in data.upper():
                connection.sendall(bytes([byte]))

    with serving(answer_byte_by_byte) as server:
        done = run("--ping", *server, "-c", "3", "-i", "0.01")
    assert counts(done.stdout.decode()) == [3, 3, 0, 0, 0]


# What a daemon promises


def test_nothing_is_lost_by_a_reload(tmp_path: Path) -> None:
    with Daemon() as daemon:
        arguments = [*place(daemon.addresses[0]), "--connections", "20", "-i", "0.05", *LONG]
        with pinging(tmp_path / "output", *arguments) as ping:
            ping.go_on()
            daemon.reload(max_connections=100)
            ping.go_on()
            assert ping.end() == 0
    sent, answered, *rest = counts(ping.text, -1)
    assert sent == answered > 20
    assert rest == [0, 0, 0]


def test_nothing_is_lost_by_a_restart(service: Service, tmp_path: Path) -> None:
    arguments = [*place(service.address), "--connections", "20", "-i", "0.05", *LONG]
    with service.daemon(), pinging(tmp_path / "output", *arguments) as ping:
        ping.go_on()
        for _ in range(2):
            with service.daemon():
                ping.go_on()
        with service.daemon():
            ping.go_on()
            assert ping.end() == 0
    sent, answered, *rest = counts(ping.text, -1)
    assert sent == answered > 20
    assert rest == [0, 0, 0]


# Loss


def test_killed_worker_costs_nothing(tmp_path: Path) -> None:
    with Daemon() as daemon, contextlib.ExitStack() as stack:
        arguments = [*place(daemon.addresses[0]), "-i", "0.02", "--connections", "10", *LONG]
        ping = stack.enter_context(pinging(tmp_path / "output", *arguments))
        for worker in daemon.workers():
            ping.go_on()
            os.kill(worker, signal.SIGKILL)
        ping.go_on()
        assert ping.end() == 0
    sent, answered, *rest = counts(ping.text, -1)
    assert sent == answered > 20
    assert rest == [0, 0, 0]


def test_worker_killed_with_its_keeper_costs_a_line_and_a_connection(tmp_path: Path) -> None:
    with Daemon(workers=1) as daemon, contextlib.ExitStack() as stack:
        arguments = [*place(daemon.addresses[0]), "-i", "0.02", *LONG]
        ping = stack.enter_context(pinging(tmp_path / "output", *arguments))
        ping.shows("seq=2 time=.* ms")
        [worker] = daemon.workers()
        with stopped(worker):
            until(lambda: ping.counts()[0] > ping.counts()[1])
            daemon.kill_with_keeper(worker)
        ping.shows("seq=[0-9]+ lost: .+")
        ping.shows("reconnected")
        ping.go_on()
        assert ping.end() == 1
    sent, answered, lost, wrong, reconnected = counts(ping.text, -1)
    assert (sent, wrong, reconnected) == (answered + lost, 0, 1)
    assert ping.text.count(" lost: ") == lost > 0


def answer_once(connection: socket.socket) -> None:
    connection.sendall(connection.recv(1000).upper())


@pytest.mark.parametrize(("options", "status"), [([], 1), (["--allow-disconnects"], 0)])
def test_connection_that_ends_between_two_lines_is_a_failure(
    options: list[str], status: int
) -> None:
    with serving(answer_once, answer_once) as server:
        done = run("--ping", *server, "-c", "2", "-i", str(PATIENCE), *options)
    assert done.returncode == status
    assert "2 answered, 0 lost (0 %), 0 wrong, 1 disconnected, 1 re" in done.stdout.decode()
    told = re.sub(r"time=\S+", "time=T", done.stdout.decode()).splitlines()[1:5]
    assert told[:2] == ["seq=1 time=T ms", "disconnected: the server closed the connection"]
    assert told[2:] == ["reconnected", "seq=2 time=T ms"]
    assert counts(done.stdout.decode()) == [2, 2, 0, 0, 1]


def test_connection_may_end_after_the_last_answer() -> None:
    with serving(answer_once) as server:
        done = run("--ping", *server, "-c", "1")
    assert done.returncode == 0
    assert " 0 disconnected" in done.stdout.decode()


def test_problems_are_shown_without_the_answers_and_with_the_time() -> None:
    before = time.time()
    with serving(answer_once, answer_once) as server:
        done = run("--ping", *server, "-c", "2", "-i", str(PATIENCE), "--problems", "-D")
    _, *shown = done.stdout.decode().splitlines()[:-3]
    parts = [re.fullmatch(r"\[([0-9]+\.[0-9]{6})\] (.*)", line) for line in shown]
    texts = [part[2] for part in parts if part]
    assert texts == ["disconnected: the server closed the connection", "reconnected"]
    assert all(part and before <= float(part[1]) <= time.time() for part in parts)


def test_summary_in_json() -> None:
    with serving(answer_once, answer_once) as server:
        done = run("--ping", *server, "-c", "2", "-i", str(PATIENCE), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert [found[name] for name in ("sent", "answered", "lost", "loss_percent")] == [2, 2, 0, 0]
    assert [found[name] for name in ("disconnected", "reconnected", "wrong")] == [1, 1, 0]
    assert 0 < found["min"] <= found["avg"] <= found["max"] <= found["longest_gap"]


def test_no_gap_is_told_if_there_was_no_answer() -> None:
    with nobody() as server:
        done = run("--ping", *server, "-c", "1")
    assert done.stdout.endswith(
        b"\n1 sent, 0 answered, 1 lost (100 %), 0 wrong, 0 disconnected, 0 reconnected\n"
    )


def test_reset_connection() -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(1000)
        reset_at_close(connection)

    with serving(reset, upper_all) as server:
        done = run("--ping", *server, "-c", "2", "-i", str(PATIENCE))
    assert done.returncode == 1
    assert (
        "\nseq=1 lost: Connection reset by peer\nreconnected\nseq=2 time=" in done.stdout.decode()
    )
    assert counts(done.stdout.decode()) == [2, 1, 1, 0, 1]


def test_echo_is_a_wrong_answer() -> None:
    def echo(connection: socket.socket) -> None:
        connection.sendall(connection.recv(1000))

    with serving(echo, upper_all) as server:
        done = run("--ping", *server, "-c", "2", "-i", str(PATIENCE))
    assert done.returncode == 1
    assert re.search(r"^seq=1 lost: wrong answer 'tcpupper .*'$", done.stdout.decode(), re.M)
    assert counts(done.stdout.decode()) == [2, 1, 1, 1, 1]


def test_second_answer_to_a_line_is_wrong() -> None:
    def answer_twice(connection: socket.socket) -> None:
        connection.sendall(2 * connection.recv(1000).upper())

    with serving(answer_twice) as server:
        done = run("--ping", *server, "-c", "1")
    assert done.returncode == 1
    assert "\ndisconnected: wrong answer 'TCPUPPER " in done.stdout.decode()
    assert counts(done.stdout.decode()) == [1, 1, 0, 1, 0]


def test_silent_server_is_given_up() -> None:
    with serving(stay_silent, upper_all) as server:
        done = run("--ping", *server, "--timeout", "2", "-c", "2", "-i", str(PATIENCE))
    assert done.returncode == 1
    assert "\nseq=1 lost: no answer for 2 s\nreconnected\nseq=2 time=" in done.stdout.decode()
    assert counts(done.stdout.decode()) == [2, 1, 1, 0, 1]
    assert longest_gap(done.stdout.decode()) > 2  # not from the loss on, but from the line


def test_server_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    with (
        nobody("127.0.0.2") as server,  # no other test's clients are there
        pinging(tmp_path / "output", *server, "-i", "0.02") as ping,
    ):
        ping.shows("seq=1 lost: cannot connect: Connection refused")
        with Daemon(listen=[f"127.0.0.2:{server[3]}"]):
            ping.shows("seq=[0-9]+ time=.* ms")
            assert ping.end() == 1
    sent, answered, lost, wrong, reconnected = counts(ping.text, -1)
    assert (sent, wrong, reconnected) == (answered + lost, 0, 0)


def test_unanswered_attempt_to_connect_is_given_up() -> None:
    with full_queue() as server:
        done = run("--ping", *server, "--timeout", "0.2", "-c", "1")
    assert done.returncode == 1
    assert "\nseq=1 lost: cannot connect: timed out\n" in done.stdout.decode()


def test_address_that_drops_packets_has_a_share_of_the_time() -> None:
    """The next address is tried within the time for the same line."""
    done = run_behind_full_queue("--ping", "-c", "1", "--timeout", "10")
    assert counts(done.stdout.decode()) == [1, 1, 0, 0, 0]


def test_every_address_of_a_name_is_tried() -> None:
    with serving(upper_all) as server:
        done = run("--ping", "--host", "localhost", *server[2:], "-c", "1")
    assert counts(done.stdout.decode()) == [1, 1, 0, 0, 0]


def test_unknown_name_is_an_error() -> None:
    done = run("--ping", "--host", "name.invalid", "-c", "1")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"tcpupper: cannot connect to name.invalid:9999: ")


def test_lines_that_the_server_does_not_read_are_sent_later(tmp_path: Path) -> None:
    """So many that the kernel takes no more, and parts of lines stay."""
    proceed = threading.Event()

    def answer_when_told(connection: socket.socket) -> None:
        assert proceed.wait(DEADLINE)
        upper_all(connection)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        with (
            serving(answer_when_told, listener=listener) as server,
            pinging(
                tmp_path / "output", *server, "--timeout", "60", "-c", "2000", "-i", "0.001"
            ) as ping,
        ):
            until(lambda: ping.counts()[0] > 1000)  # a queue of 208 KiB has room for some 280
            proceed.set()
            assert ping.process.wait(DEADLINE) == 0
    assert counts(ping.text, -1) == [2000, 2000, 0, 0, 0]


def test_answer_that_came_while_the_client_was_stopped_is_in_time(tmp_path: Path) -> None:
    received, proceed, answered = threading.Event(), threading.Event(), threading.Event()

    def answer_when_told(connection: socket.socket) -> None:
        line = connection.recv(1000)
        received.set()
        assert proceed.wait(DEADLINE)
        connection.sendall(line.upper())
        answered.set()
        connection.recv(1000)

    with (
        serving(answer_when_told) as server,
        pinging(tmp_path / "output", *server, "--timeout", str(PATIENCE), "-c", "1") as ping,
    ):
        assert received.wait(DEADLINE)
        with stopped(ping.process.pid):
            proceed.set()
            assert answered.wait(DEADLINE)
            assert_still_running(ping.process, 1.1 * PATIENCE)  # until its time has passed
        assert ping.process.wait(DEADLINE) == 0
    assert counts(ping.text) == [1, 1, 0, 0, 0]


# Ending


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_with_a_summary(number: int, tmp_path: Path) -> None:
    with serving(upper_all) as server, pinging(tmp_path / "output", *server, "-i", "0.01") as ping:
        ping.shows("seq=3 time=.* ms")
        assert ping.end(number) == 0
    sent, answered, *rest = counts(ping.text)
    assert sent == answered >= 3
    assert rest == [0, 0, 0]


def test_signal_ends_a_run_without_answers(tmp_path: Path) -> None:
    with serving(stay_silent) as server, pinging(tmp_path / "output", *server) as ping:
        until(lambda: ping.counts()[0])
        assert ping.end() == 1
    assert "\nseq=1 lost: no answer before the run ended\n" in ping.text


def test_deadline_ends_with_a_summary() -> None:
    with serving(upper_all) as server:
        done = run("--ping", *server, "-i", "0.01", "-w", "1")
    sent, answered, *rest = counts(done.stdout.decode())
    assert done.returncode == 0
    assert sent == answered > 0
    assert rest == [0, 0, 0]


def test_deadline_waits_for_the_lines_that_are_due(tmp_path: Path) -> None:
    """Their own time limit is the timeout."""
    proceed = threading.Event()

    def answer_when_told(connection: socket.socket) -> None:
        assert proceed.wait(DEADLINE)
        upper_all(connection)

    with (
        serving(answer_when_told) as server,
        pinging(tmp_path / "output", *server, "--timeout", "60", "-w", "0.1", "-i", "9") as ping,
    ):
        assert_still_running(ping.process, 1.5)
        proceed.set()
        assert ping.process.wait(DEADLINE) == 0
    assert counts(ping.text) == [1, 1, 0, 0, 0]


def test_closed_output_ends_quietly() -> None:
    with serving(upper_all) as server, started("--ping", *server, "-i", "0.01") as process:
        assert process.stdout
        assert process.stdout.read(5) == b"PING "
        process.stdout.close()
        assert process.wait(DEADLINE) == -signal.SIGPIPE
        assert process.stderr
        assert process.stderr.read() == b""


def test_second_interrupt_ends_while_the_output_is_stuck() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb") as full:
        fill(full.fileno())
        with started("--ping", stdout=full.fileno()) as process:
            # Python has a handler for SIGINT from the start; the client's is set before that for
            # SIGQUIT.
            until(lambda: catches(process.pid, signal.SIGQUIT))
            process.send_signal(signal.SIGINT)
            until(lambda: not catches(process.pid, signal.SIGINT))
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == -signal.SIGINT


def fill(pipe: int) -> None:
    """Write to a pipe until it has no room for a byte; writers may still wait for room."""
    own = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(own, bytes(size))
    os.close(own)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (proc_pid_status(5))."""
    [mask] = re.findall("^SigCgt:\t([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_full_disk() -> None:
    with open("/dev/full", "wb") as full:
        done = run("--ping", "-c", "1", stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == b"tcpupper: cannot write standard output: No space left on device\n"


def test_too_few_descriptors() -> None:
    command = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *CLIENT, "--ping"]
    done = subprocess.run(
        [*command, "--connections", "64"], cwd=ROOT, stdout=PIPE, stderr=PIPE, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"64 connections need 96 descriptors, but the hard limit is 64;" in done.stderr
