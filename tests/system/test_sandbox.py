"""The units: what the service cannot do, and where it still works."""

import re
from pathlib import Path

import pytest

from system.conftest import install
from system.container import Container
from system.roots import RELEASES, TESTING
from system.service import (
    CONFIGURATION,
    SERVICE,
    SOCKET,
    Conversation,
    answer,
    drop_in,
    is_active,
    main_pid,
)
from waiting import until

EVERYWHERE = [*RELEASES, TESTING]
EXPOSURE_IN_TENTHS = 2

#: The mounts inside that can be written to, and why that does no harm.
WRITABLE = {
    "/proc": "a process's own affairs, and those of its equals that are not closed to it",
    "/sys/fs/cgroup/system.slice/tcpupperd.service/memory.pressure": (
        "systemd 254 and later let a service ask to be told of a shortage of memory"
    ),
}

#: Prints all that is in folders and is no folder.
FILES = """
import os, sys
for top in sys.argv[1:]:
    for folder, _, names in os.walk(top):
        for name in names:
            print(f"{folder}/{name}")
"""

EXAMPLES = "/usr/share/doc/tcpupperd/examples"


def test_units_are_valid(machine: Container) -> None:
    assert machine.run("systemd-analyze", "verify", "--man=no", SERVICE, SOCKET) == ""


@pytest.mark.parametrize("release", EVERYWHERE, indirect=True)
def test_exposure(machine: Container) -> None:
    threshold = f"--threshold={EXPOSURE_IN_TENTHS}"
    machine.run("systemd-analyze", "security", "--no-pager", threshold, SERVICE)


@pytest.mark.parametrize("release", EVERYWHERE, indirect=True)
def test_no_mount_is_writable(machine: Container) -> None:
    """However the permissions of its files are."""
    inside = machine.run("cat", f"/proc/{main_pid(machine)}/mountinfo")
    # proc(5): the fifth is where it is mounted, the sixth are its options.
    mounts = [line.split()[4:6] for line in inside.splitlines()]
    assert {"/", "/usr/lib"} <= {path for path, _ in mounts}
    writable = {path for path, options in mounts if "ro" not in options.split(",")}
    assert writable - WRITABLE.keys() == set()


@pytest.mark.parametrize("release", EVERYWHERE, indirect=True)
def test_c_module_is_in_use(machine: Container) -> None:
    """In the sandbox, where only some places may be mapped to be executed."""
    maps = machine.run("cat", f"/proc/{main_pid(machine)}/maps")
    module = r"/usr/lib/tcpupperd/.*/_fast_path\.abi3\.so"
    mapped = re.findall(rf" (r.x)p .* {module}$", maps, re.MULTILINE)
    assert mapped == ["r-x"]
    assert ", using the C module" in machine.run("journalctl", f"--unit={SERVICE}")


@pytest.mark.parametrize("release", EVERYWHERE, indirect=True)
def test_nothing_of_other_services_is_inside(machine: Container) -> None:
    inside = ("nsenter", f"--target={main_pid(machine)}", "--mount", "--", "/usr/bin/python3")
    found = machine.run(*inside, "-c", FILES, "/run", "/var").split()
    assert set(found) == {"/run/systemd/notify", "/run/host-journal"}


@pytest.mark.parametrize("release", EVERYWHERE, indirect=True)
def test_notifications_arrive_after_the_service_manager_was_replaced(machine: Container) -> None:
    """Its socket inside is still the one that it reads."""
    drop_in(machine, SERVICE, "[Service]\nWatchdogSec=1\n")
    machine.run("systemctl", "restart", SERVICE)
    machine.run("systemctl", "daemon-reexec")
    with Conversation(machine) as conversation:
        assert conversation.ask("hello") == "HELLO"
        until(lambda: ", 1 of " in machine.show(SERVICE, "StatusText"))
    assert machine.show(SERVICE, "NRestarts") == "0"


def test_service_executes_nothing_else(machine: Container) -> None:
    inside = ("nsenter", f"--target={main_pid(machine)}", "--mount", "--")
    machine.run(*inside, "/usr/bin/python3", "-c", "")
    for program in ("/bin/sh", "/usr/bin/env", "/usr/bin/perl"):
        assert "Permission denied" in machine.try_run(*inside, program).stdout


def test_service_has_no_network_and_no_rights(machine: Container) -> None:
    status = machine.run("cat", f"/proc/{main_pid(machine)}/status")
    assert "CapEff:\t0000000000000000" in status
    assert "Seccomp:\t2" in status
    assert "\nUid:\t0\t" not in status
    networks = [f"/proc/{pid}/ns/net" for pid in (main_pid(machine), 1)]
    assert len(set(machine.run("readlink", *networks).splitlines())) == 2
    links = machine.run("nsenter", f"--target={main_pid(machine)}", "--net", "ip", "-o", "link")
    assert [line.split()[1] for line in links.splitlines()] == ["lo:"]


def test_serves_without_ipv6(bare_machine: Container, package: Path) -> None:
    bare_machine.write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")
    install(bare_machine, package)
    assert bare_machine.run("tcpupper", "hello") == "HELLO"
    assert bare_machine.run("systemctl", "is-active", SERVICE, SOCKET) == "active\nactive"


def test_queue_is_as_long_as_the_unit_says(machine: Container) -> None:
    listening = machine.run("ss", "--no-header", "-tln", "sport", "=", ":9999").splitlines()
    backlog = int(machine.show(SOCKET, "Backlog"))
    limit = int(machine.run("cat", "/proc/sys/net/core/somaxconn"))
    assert {int(line.split()[2]) for line in listening} == {min(backlog, limit)}
    assert len(listening) == 2


def test_example_unix_socket(machine: Container) -> None:
    use_example(machine, "unix-socket.conf", SOCKET)
    assert machine.run("tcpupper", "--unix", "/run/tcpupperd.sock", "hello") == "HELLO"
    assert machine.run("tcpupper", "hello") == "HELLO"


def test_example_another_port(machine: Container) -> None:
    use_example(machine, "another-port.conf", SOCKET)
    assert machine.run("tcpupper", "--port", "7", "hello") == "HELLO"
    assert machine.try_run("tcpupper", "hello").returncode != 0


def test_example_all_addresses(machine: Container) -> None:
    machine.run("ip", "address", "add", "198.51.100.1/32", "dev", "lo")
    use_example(machine, "all-addresses.conf", SOCKET)
    assert machine.run("tcpupper", "--host", "127.0.0.1", "hello") == "HELLO"
    assert "*:9999" in machine.run("ss", "-tln")


# systemd 252 does not know the type.
@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_example_notify_reload(machine: Container) -> None:
    use_example(machine, "notify-reload.conf", SERVICE)
    assert machine.show(SERVICE, "Type") == "notify-reload"
    for action in ("restart", "reload"):
        machine.run("systemctl", action, SERVICE)
        assert answer(machine, "hello\n") == "HELLO"
    assert "reloaded: " in machine.journal(f"--unit={SERVICE}")
    machine.write(CONFIGURATION, "workers = 0\n")
    assert machine.try_run("systemctl", "reload", SERVICE).returncode != 0
    assert is_active(machine)


def use_example(machine: Container, name: str, unit: str) -> None:
    drop_in(machine, unit, machine.run("cat", f"{EXAMPLES}/{name}"))
    machine.run("systemctl", "restart", SOCKET, SERVICE)
