"""What an intruder could do inside the service's sandbox."""

from pathlib import Path

import pytest

from system.container import Container
from system.misbehave import ATTEMPTS
from system.roots import RELEASES, TESTING
from system.service import SERVICE, SOCKET, drop_in, is_active
from waiting import until

SCRIPT = "/opt/misbehave.py"

#: In place of the service, with all that the service has: its sandbox, its sockets and its code.
IN_ITS_PLACE = f"""
[Service]
Type=exec
Restart=no
WatchdogSec=0
ExecStart=
ExecStart=/usr/bin/python3 {SCRIPT} --workers=1
"""

#: What the units leave possible; SECURITY.md says what it means.
POSSIBLE = {
    "execute from memory",
    "log as another service",
    "limit the supervisor",
    "write its own code after asking",
}

FOREIGN = "198.51.100.1"
ONLY_LOOPBACK = """
[Socket]
ListenStream=
ListenStream=0.0.0.0:9999
IPAddressDeny=any
IPAddressAllow=127.0.0.1
"""

pytestmark = pytest.mark.parametrize("release", [*RELEASES, TESTING], indirect=True)


def test_misbehaviour_fails(machine: Container) -> None:
    assert misbehave(machine) == POSSIBLE


def test_foreign_clients_are_not_let_in(machine: Container) -> None:
    machine.run("ip", "address", "add", f"{FOREIGN}/32", "dev", "lo")
    drop_in(machine, SOCKET, ONLY_LOOPBACK)
    machine.run("systemctl", "restart", SOCKET, SERVICE)
    assert machine.run("tcpupper", "--host", "127.0.0.1", "hello") == "HELLO"
    # Its packets are dropped, so it would wait for long.
    assert (
        machine.try_run("timeout", "3", "tcpupper", "--host", FOREIGN, "hello").returncode == 124
    )


def misbehave(machine: Container) -> set[str]:
    """The attempts that succeed."""
    machine.write(SCRIPT, (Path(__file__).parent / "misbehave.py").read_text())
    machine.run("systemctl", "stop", SERVICE, SOCKET)
    drop_in(machine, SERVICE, IN_ITS_PLACE)
    machine.run("systemctl", "start", SOCKET, SERVICE)
    until(lambda: not is_active(machine))
    said = machine.journal("--output=cat", f"--unit={SERVICE}").splitlines()
    print("\n".join(said))
    outcome = dict(line.split(": ", 1) for line in said if line.partition(": ")[0] in ATTEMPTS)
    assert outcome.keys() == ATTEMPTS.keys()
    return {name for name in ATTEMPTS if outcome[name].startswith("done")}
