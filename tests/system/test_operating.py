"""The commands in docs/operating.md show the causes of the symptoms next to which they stand, and
cure them."""

import re
from contextlib import ExitStack

from documents import ROOT, section
from system.container import Container
from system.service import (
    CONFIGURATION,
    SERVICE,
    SOCKET,
    Conversation,
    answer,
    drop_in,
    is_active,
    workers,
)
from waiting import until

TABLE = section((ROOT / "docs/operating.md").read_text(), "Troubleshooting by symptom")


def remedy(symptom: str) -> list[str]:
    """The last command in the row of a symptom."""
    return str(re.findall(r"`(systemctl [^`]+)`", row_of(symptom)[3])[-1]).split()


def test_remedies(machine: Container) -> None:
    """One machine for all: each cure must be complete."""
    machine.run("systemctl", "stop", SOCKET, SERVICE)
    assert machine.try_run("tcpupper", "hello").returncode == 1
    machine.run(*remedy("`Connection refused`"))
    assert answer(machine, "hello\n") == "HELLO"

    drop_in(machine, SOCKET, "[Socket]\nListenStream=\nListenStream=127.0.0.1:7777\n")
    machine.run("systemctl", "restart", SERVICE)
    until(lambda: "was changed" in status(machine))
    machine.run(*remedy('the status line says "was changed"'))
    until(lambda: "was changed" not in status(machine))
    assert machine.run("tcpupper", "--port", "7777", "hello") == "HELLO"

    machine.write(CONFIGURATION, "workers = 3\n")
    assert len(workers(machine)) != 3
    machine.run(*remedy("a change in the file has no effect"))
    until(lambda: len(workers(machine)) == 3)

    machine.write(CONFIGURATION, "workers = 0\n")
    machine.run("systemctl", "restart", SERVICE)
    until(lambda: "last good configuration" in status(machine))
    machine.write(CONFIGURATION, "")
    machine.run(*remedy('the status line says "last good configuration"'))
    until(lambda: "last good configuration" not in status(machine))

    machine.run("systemctl", "stop", SERVICE)
    machine.write(CONFIGURATION, "workers = 0\n")
    assert machine.try_run("systemctl", "start", SERVICE).returncode != 0
    assert machine.show(SERVICE, "ExecMainStatus") == "78"
    machine.write(CONFIGURATION, "")
    machine.run(*remedy("the service does not start, status 78"))
    assert is_active(machine)


def status(machine: Container) -> str:
    return machine.show(SERVICE, "StatusText")


def look(machine: Container, symptom: str) -> str:
    """What the command prints that the row of a symptom says to look at."""
    command = str(re.findall(r"`([^`]+)`", row_of(symptom)[2])[0])
    machine.run("journalctl", "--sync")
    return machine.run(*command.split())


def test_commands_show_the_cause(machine: Container) -> None:
    """One machine for all, from which each part removes its cause."""
    only_local_addresses(machine)
    too_many_connections(machine)
    no_header(machine)
    header_on_the_plain_socket(machine)
    timed_out(machine)
    answers_not_read(machine)
    invalid_file(machine)
    killed(machine)
    no_store(machine)
    frozen(machine)
    no_usable_socket(machine)


def configure(machine: Container, text: str) -> None:
    machine.write(CONFIGURATION, text)
    machine.run("systemctl", "restart", SERVICE)


def only_local_addresses(machine: Container) -> None:
    symptom = "`Connection refused`, but only from other hosts"
    machine.run("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
    other = ("tcpupper", "--host", "192.0.2.1", "hello")
    assert "Connection refused" in machine.try_run(*other).stdout
    listening = look(machine, symptom)
    assert "127.0.0.1:9999" in listening
    assert "*:9999" not in listening
    example = (ROOT / "systemd/examples/all-addresses.conf").read_text()
    assert "`all-addresses.conf`" in " ".join(row_of(symptom))
    drop_in(machine, SOCKET, example)
    machine.run(*remedy(symptom))
    assert machine.run(*other) == "HELLO"


def too_many_connections(machine: Container) -> None:
    """Per client, and in all; then the accept queue is full, too."""
    machine.write(f"/etc/systemd/system/{SOCKET}.d/backlog.conf", "[Socket]\nBacklog=1\n")
    machine.run("systemctl", "daemon-reload")
    machine.write(CONFIGURATION, "workers = 1\nmax_connections_per_source = 1\n")
    machine.run("systemctl", "restart", SOCKET)
    with Conversation(machine, "--host=127.0.0.1") as conversation:
        assert conversation.ask("one") == "ONE"
        assert machine.try_run("tcpupper", "--host=127.0.0.1", "two").returncode == 1
        assert quoted("a connection is accepted and closed immediately") in log(machine)
    configure(machine, "workers = 1\nmax_connections = 1\n")
    with Conversation(machine) as conversation, ExitStack() as waiting:
        assert conversation.ask("one") == "ONE"
        symptom = "a connection is accepted, but no answer arrives"
        until(lambda: "full" in look(machine, symptom))
        for _ in range(4):
            waiting.enter_context(Conversation(machine, "--host=127.0.0.1"))
        until(lambda: overflows(look(machine, "connecting takes 1, 3 or 7 seconds")))


def overflows(shown: str) -> int:
    [line] = (line for line in shown.splitlines() if "Overflows" in line)
    return int(line.split()[1])


def no_header(machine: Container) -> None:
    configure(machine, "")
    machine.run("systemctl", "enable", "tcpupperd-proxy.socket")
    machine.run("systemctl", "restart", SERVICE)
    until(lambda: is_active(machine, "tcpupperd-proxy.socket"))
    assert machine.try_run("tcpupper", "--port=9997", "hello").returncode == 1
    symptom = "a connection is accepted and closed immediately, behind a load balancer"
    assert quoted(symptom) in log(machine)


def header_on_the_plain_socket(machine: Container) -> None:
    configure(machine, "log_connections = true\n")
    symptom = "the log names the load balancer, not its clients"
    until(lambda: "127.0.0.1:9997" in look(machine, symptom))
    send_header(machine, 9999)
    until(lambda: "\n127.0.0.1:" in log(machine, "--output=cat"))
    assert "192.0.2.7:4000" not in log(machine)
    send_header(machine, 9997)
    until(lambda: "192.0.2.7:4000: " in log(machine))


def send_header(machine: Container, port: int) -> None:
    header = r"PROXY TCP4 192.0.2.7 192.0.2.1 4000 9997\r\n"
    machine.run("bash", "-c", f"printf '{header}' >/dev/tcp/127.0.0.1/{port}")


def timed_out(machine: Container) -> None:
    configure(machine, "idle_timeout = 0.1\nlog_connections = true\n")
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        until(lambda: conversation.client.poll() is not None)
    assert "TCPUPPERD_REASON=idle timeout" in log(machine, "--output=verbose")
    assert row_of("a connection is closed for no apparent reason")[3].count("TCPUPPERD_REASON")
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=USR1", SERVICE)
    until(lambda: " idle_timeout=1 " in log(machine))
    assert "`idle_timeout`" in row_of("a connection is closed after some minutes")[2]


def answers_not_read(machine: Container) -> None:
    symptom = "a client sees its connection reset"
    configure(machine, "write_timeout = 0.2\n")
    sends_only = ("bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9999; yes >&3")
    assert "reset by peer" in machine.try_run(*sends_only).stdout
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=USR1", SERVICE)
    assert row_of(symptom)[2].startswith("the counter `write_timeout`")
    until(lambda: " write_timeout=1 " in log(machine))


def killed(machine: Container) -> None:
    """Only the kernel's log says whether it was for lack of memory; a container has none."""
    machine.run("kill", "-KILL", str(min(workers(machine))))
    until(lambda: "was killed by SIGKILL (out of memory?)" in log(machine))
    assert row_of('"was killed by SIGKILL (out of memory?)"')[2] == "`journalctl -k`"


def frozen(machine: Container) -> None:
    symptom = "all connections are reset while or after the service is frozen"
    drop_in(machine, SERVICE, "[Service]\nWatchdogSec=1\nTimeoutAbortSec=1\n")
    machine.run("systemctl", "restart", SERVICE)
    machine.run("systemctl", "kill", "--kill-whom=all", "--signal=STOP", SERVICE)
    until(lambda: "Watchdog timeout" in look(machine, symptom))
    until(lambda: is_active(machine))


def no_usable_socket(machine: Container) -> None:
    symptom = "the service does not start, status 71"
    machine.run("systemctl", "disable", "--now", "tcpupperd-proxy.socket", SOCKET, SERVICE)
    drop_in(machine, SOCKET, "[Socket]\nListenStream=\nListenDatagram=127.0.0.1:9999\n")
    machine.try_run("systemctl", "start", SERVICE)
    until(lambda: "status=71/OSERR" in look(machine, symptom))


def invalid_file(machine: Container) -> None:
    machine.write(CONFIGURATION, "workers = 3\n")
    shown = look(machine, "a change in the file has no effect")
    assert f"workers = 3  # {CONFIGURATION}:1" in shown
    machine.write(CONFIGURATION, "workers = 0\n")
    assert machine.try_run("systemctl", "reload", SERVICE).returncode == 1
    failed = f"reload failed, keeping the current configuration: {CONFIGURATION}:1"
    assert failed in look(machine, "a reload fails")
    machine.run("systemctl", "restart", SERVICE)
    symptom = 'the status line says "last good configuration"'
    until(lambda: f"{CONFIGURATION}:1: workers = 0" in look(machine, symptom))
    machine.write(CONFIGURATION, "")
    machine.run("systemctl", "reload", SERVICE)


def no_store(machine: Container) -> None:
    drop_in(machine, SERVICE, "[Service]\nFileDescriptorStoreMax=0\n")
    machine.run("systemctl", "restart", SERVICE)
    until(lambda: quoted("a restart closes connections") in log(machine))


def row_of(symptom: str) -> list[str]:
    """The cells of the row of a symptom, with an empty one in front."""
    [row] = (row for row in TABLE.splitlines() if row.startswith(f"| {symptom} |"))
    return [cell.strip() for cell in row.split("|")]


def quoted(symptom: str) -> str:
    """The first message that the row of a symptom quotes."""
    return str(re.findall(r'"([^"]+)"', row_of(symptom)[2])[0])


def log(machine: Container, *options: str) -> str:
    return machine.journal(f"--unit={SERVICE}", *options)
