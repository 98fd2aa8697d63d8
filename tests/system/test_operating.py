"""The commands in docs/operating.md cure the symptoms next to which they stand."""

import re

from documents import ROOT, section
from system.container import Container
from system.service import CONFIGURATION, SERVICE, SOCKET, answer, drop_in, is_active, workers
from waiting import until

TABLE = section((ROOT / "docs/operating.md").read_text(), "Troubleshooting by symptom")


def remedy(symptom: str) -> list[str]:
    """The last command in the row of a symptom."""
    [row] = (row for row in TABLE.splitlines() if row.startswith(f"| {symptom} |"))
    return str(re.findall(r"`(systemctl [^`]+)`", row)[-1]).split()


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
