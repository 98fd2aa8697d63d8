"""Additional instances and the examples that replace units."""

import re

import pytest

from system.container import Container
from system.roots import RELEASES, TESTING
from system.service import SERVICE, SOCKET, Conversation, answer, drop_in, is_active, main_pid
from waiting import until

EXAMPLES = "/usr/share/doc/tcpupperd/examples"
UNITS = "/etc/systemd/system"
INSTANCE_SOCKET = "tcpupperd@7777.socket"
INSTANCE_SERVICE = "tcpupperd@7777.service"
UNIX_SOCKET = "/run/tcpupperd.sock"

pytestmark = pytest.mark.parametrize("release", [*RELEASES, TESTING], indirect=True)


def test_instance_has_its_own_configuration_processes_and_sandbox(machine: Container) -> None:
    start_instance(machine, "framing = 'none'\n")
    assert answer(machine, "first\n") == "FIRST"
    assert machine.run("tcpupper", "--port=7777", "second") == "SECOND"
    pid = machine.show(INSTANCE_SERVICE, "MainPID")
    assert pid not in ("0", str(main_pid(machine)))
    until(lambda: is_active(machine, INSTANCE_SERVICE))
    command = machine.run("tr", r"\0", " ", stdin=machine.run("cat", f"/proc/{pid}/cmdline"))
    assert "--config /etc/tcpupperd/7777.toml" in command
    assert "port 7777" in machine.show(INSTANCE_SERVICE, "Description")
    machine.run("systemctl", "reload", INSTANCE_SERVICE)
    machine.run("systemd-analyze", "security", "--threshold=2", INSTANCE_SERVICE)


def test_instance_is_upgraded_and_removed_with_the_package(machine: Container) -> None:
    start_instance(machine, "")
    assert machine.run("tcpupper", "--port=7777", "hello") == "HELLO"
    until(lambda: is_active(machine, INSTANCE_SERVICE))
    pid = machine.show(INSTANCE_SERVICE, "MainPID")
    socket = machine.show(INSTANCE_SOCKET, "InvocationID")
    machine.run("sh", "-c", "dpkg --install /mnt/tcpupperd_*.deb")
    assert machine.run("tcpupper", "--port=7777", "again") == "AGAIN"
    assert machine.show(INSTANCE_SERVICE, "MainPID") not in ("0", pid)
    assert machine.show(INSTANCE_SOCKET, "InvocationID") == socket
    machine.run("apt-get", "remove", "--yes", "tcpupperd")
    assert "LISTEN" not in machine.run("ss", "-tln")


def test_enabled_instance_starts_at_boot(machine: Container) -> None:
    machine.write("/etc/tcpupperd/7777.toml", "")
    machine.run("systemctl", "enable", INSTANCE_SERVICE)
    wanted = "sockets.target.wants", "multi-user.target.wants"
    for folder, unit in zip(wanted, (INSTANCE_SOCKET, INSTANCE_SERVICE), strict=True):
        machine.run("test", "-L", f"{UNITS}/{folder}/{unit}")


def test_purge_leaves_nothing_of_instances(machine: Container) -> None:
    machine.write("/etc/tcpupperd/7777.toml", "")
    machine.run("systemctl", "enable", "--now", INSTANCE_SOCKET, INSTANCE_SERVICE)
    machine.run("apt-get", "purge", "--yes", "tcpupperd")
    assert machine.run("find", "/etc", "-path", "*tcpupper*") == ""


def test_package_in_another_root_leaves_the_instances_of_this_one(machine: Container) -> None:
    """The scripts as dpkg(1) calls them for another root, with DPKG_ROOT."""
    start_instance(machine, "")
    assert machine.run("tcpupper", "--port=7777", "hello") == "HELLO"
    until(lambda: is_active(machine, INSTANCE_SERVICE))
    pid = machine.show(INSTANCE_SERVICE, "MainPID")
    # py3clean(1) and py3compile(1) look for the files of the package there.
    machine.run("mkdir", "--parents", "/other/var/lib", "/other/usr/lib")
    machine.run("cp", "--archive", "/var/lib/dpkg", "/other/var/lib")
    machine.run("cp", "--archive", "/usr/lib/tcpupperd", "/other/usr/lib")
    for script, action in (
        ("prerm", "remove"),
        ("postrm", "purge"),
        ("postinst", "configure 0.1.0-1"),
    ):
        command = f"DPKG_ROOT=/other sh /var/lib/dpkg/info/tcpupperd.{script} {action}"
        machine.run("env", "DPKG_MAINTSCRIPT_PACKAGE=tcpupperd", "sh", "-c", command)
    assert machine.show(INSTANCE_SERVICE, "MainPID") == pid
    assert machine.run("tcpupper", "--port=7777", "again") == "AGAIN"
    machine.run("test", "-e", "/etc/tcpupperd/7777.toml")


def test_upgrade_leaves_what_runs_with_a_file_that_the_new_version_rejects(
    machine: Container,
) -> None:
    """Each instance for itself, and only for a version that stored no last good configuration."""
    start_instance(machine, "workers = 2\n")
    assert machine.run("tcpupper", "--port=7777", "hello") == "HELLO"
    until(lambda: is_active(machine, INSTANCE_SERVICE))
    machine.write("/etc/tcpupperd/tcpupperd.toml", "wrokers = 1\n")
    before = main_pid(machine), machine.show(INSTANCE_SERVICE, "MainPID")
    said = call_script(machine, "postinst", "configure 0.1.0-1")
    assert "/etc/tcpupperd/tcpupperd.toml:1: wrokers: unknown setting" in said
    assert f"{SERVICE} keeps running version 0.1.0-1; correct /etc/tcpupperd/tcpupperd" in said
    assert main_pid(machine) == before[0]
    assert machine.show(INSTANCE_SERVICE, "MainPID") != before[1]
    call_script(machine, "postinst", "configure 0.2.0-1")
    assert main_pid(machine) != before[0]
    assert answer(machine, "hello\n") == "HELLO"


def test_downgrade_to_0_1_0_stops_all_services_first(machine: Container) -> None:
    start_instance(machine, "")
    metrics = "tcpupperd-metrics.socket"
    machine.run("systemctl", "enable", metrics)
    machine.run("systemctl", "restart", SOCKET, SERVICE)
    assert machine.run("tcpupper", "--port=7777", "hello") == "HELLO"
    until(lambda: is_active(machine, INSTANCE_SERVICE))
    call_script(machine, "prerm", "upgrade 0.2.0-2")
    assert is_active(machine)
    call_script(machine, "prerm", "upgrade 0.1.0-1")
    for unit, state in {
        SERVICE: "inactive",
        INSTANCE_SERVICE: "inactive",
        metrics: "inactive",
        SOCKET: "active",
        INSTANCE_SOCKET: "active",
    }.items():
        assert machine.show(unit, "ActiveState") == state, unit


def call_script(machine: Container, name: str, arguments: str) -> str:
    """Call a maintainer script as dpkg(1) does; what it says."""
    command = f"sh /var/lib/dpkg/info/tcpupperd.{name} {arguments} 2>&1"
    return machine.run("env", "DPKG_MAINTSCRIPT_PACKAGE=tcpupperd", "sh", "-c", command)


def test_unix_socket_goes_with_its_unit(machine: Container) -> None:
    drop_in(machine, SOCKET, machine.run("cat", f"{EXAMPLES}/unix-socket.conf"))
    machine.run("systemctl", "restart", SOCKET, SERVICE)
    assert machine.run("tcpupper", "--unix", UNIX_SOCKET, "hello") == "HELLO"
    machine.run("systemctl", "stop", SOCKET, SERVICE)
    assert machine.try_run("test", "-e", UNIX_SOCKET).returncode == 1


def test_limits(machine: Container) -> None:
    """Those of the unit, and those of the example."""
    memory = int(machine.run("sed", "-n", r"s/MemTotal: *\([0-9]*\) kB/\1/p", "/proc/meminfo"))
    assert int(machine.show(SERVICE, "MemoryMax")) >> 20 == memory >> 11
    assert machine.show(SERVICE, "TasksMax") == "2048"
    drop_in(machine, SERVICE, machine.run("cat", f"{EXAMPLES}/limits.conf"))
    machine.run("systemctl", "restart", SERVICE)
    limits = machine.run("cat", f"/proc/{main_pid(machine)}/limits")
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    assert machine.show(SERVICE, "MemoryMax") == str(2 << 30)
    assert machine.show(SERVICE, "TasksMax") == "37"
    machine.run("systemctl", "reload", SERVICE)
    assert answer(machine, "hello\n") == "HELLO"


def test_self_binding_service(machine: Container) -> None:
    machine.run("systemctl", "disable", "--now", SOCKET, SERVICE)
    machine.write("/etc/tcpupperd/tcpupperd.toml", 'listen = ["127.0.0.1:7777"]\n')
    machine.run("cp", f"{EXAMPLES}/self-binding.service", f"{UNITS}/{SERVICE}")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "enable", "--now", SERVICE)
    assert machine.run("systemd-analyze", "verify", "--man=no", SERVICE) == ""
    assert machine.run("tcpupper", "--port=7777", "hello") == "HELLO"
    assert machine.try_run("systemctl", "is-active", SOCKET).stdout == "inactive\n"


def test_process_for_each_connection(machine: Container) -> None:
    units = ("tcpupperd-per-connection.socket", "tcpupperd-per-connection@.service")
    machine.run("cp", *(f"{EXAMPLES}/{unit}" for unit in units), UNITS)
    machine.run("systemctl", "daemon-reload")
    assert machine.run("systemd-analyze", "verify", "--man=no", units[0]) == ""
    machine.run("systemctl", "enable", "--now", units[0])
    with (
        Conversation(machine, "--port=9995") as one,
        Conversation(machine, "--port=9995") as other,
    ):
        assert (one.ask("one"), other.ask("other")) == ("ONE", "OTHER")
        until(lambda: connection_units(machine).count(" running ") == 2)
        assert (one.end(), other.end()) == ("", "")
    # Those that succeed are forgotten, those that fail as well, but not without a trace.
    until(lambda: connection_units(machine) == "")
    assert "Failed with result" not in machine.journal("--unit=tcpupperd-per-connection@*")
    assert machine.run("systemctl", "list-units", "--no-legend", "--failed") == ""


def connection_units(machine: Container) -> str:
    return machine.run(
        "systemctl", "list-units", "--plain", "--no-legend", "tcpupperd-per-connection@*"
    )


def start_instance(machine: Container, configuration: str) -> None:
    machine.write("/etc/tcpupperd/7777.toml", configuration)
    machine.run("systemctl", "start", INSTANCE_SOCKET)
