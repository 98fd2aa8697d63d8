"""The package's life: checked, installed, upgraded under load, removed, purged."""

import subprocess
from pathlib import Path

from release import UNDER_DEVELOPMENT
from system.build import both, build_package, run_offline
from system.conftest import install
from system.container import Container
from system.roots import DEPENDENCIES
from system.service import CONFIGURATION, SERVICE, SOCKET, answer
from tcpupperd import __version__
from waiting import until

LINTIAN = (
    "lintian --allow-root --pedantic --display-info --display-experimental"
    " --fail-on=error,warning,info,pedantic /mnt/*.changes"
)
if __version__.endswith(UNDER_DEVELOPMENT):
    # Only the changelog may have the distribution UNRELEASED, which no archive accepts.
    LINTIAN += " --suppress-tags=changelog-news-debian-mismatch"
# Lintian of Debian 12 alone asks for an init script. The service's readiness and sandbox are
# systemd's; hosts without it have "tcpupperd --daemonize".
UNWANTED_CHECKS = {
    "bookworm": " --suppress-tags=package-supports-alternative-init-but-no-init.d-script"
}

# Connects, asks and hangs up until its input ends; prints each failure and at last the count.
LOAD = """
import select, socket, sys
answered = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        with socket.create_connection(("127.0.0.1", 9999), 30) as connection:
            connection.sendall(b"hello\\n")
            answer = connection.recv(64)
            if answer != b"HELLO\\n":
                print("failure:", answer, flush=True)
            answered += 1
            print("answered", answered, flush=True)
    except OSError as error:
        print("failure:", error, flush=True)
"""


def test_builds_with_its_unit_tests(release: str, tmp_path: Path) -> None:
    build_package(release, tmp_path, profile="")


def test_lintian_finds_nothing(release: str, package: Path) -> None:
    assert (
        run_offline(release, package.parent, LINTIAN + UNWANTED_CHECKS.get(release, "")).strip()
        == ""
    )


def test_upgrade_loses_no_connection(machine: Container, package: Path) -> None:
    machine.write(CONFIGURATION, "max_line = 4096\n")
    socket, service = (machine.show(unit, "InvocationID") for unit in (SOCKET, SERVICE))
    newer = newer_package(machine, package)
    with machine.popen(
        "python3", "-c", LOAD, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as load:
        assert load.stdout
        assert load.stdout.readline() == "answered 1\n"
        machine.run("apt-get", "install", "--yes", *newer)
        answer(machine, "the new one answers\n")
        output, _ = load.communicate(timeout=60)
    assert "failure" not in output
    assert machine.show(SOCKET, "InvocationID") == socket
    assert machine.show(SERVICE, "InvocationID") != service
    assert (machine.show(SERVICE, "Result"), machine.show(SERVICE, "NRestarts")) == (
        "success",
        "0",
    )
    assert machine.run("cat", CONFIGURATION) == "max_line = 4096"


def test_upgrade_leaves_a_stopped_and_disabled_service_alone(
    machine: Container, package: Path
) -> None:
    machine.run("systemctl", "disable", "--now", SOCKET, SERVICE)
    machine.run("apt-get", "install", "--yes", *newer_package(machine, package))
    for unit in (SOCKET, SERVICE):
        assert machine.try_run("systemctl", "is-enabled", unit).stdout == "disabled\n"
        assert machine.try_run("systemctl", "is-active", unit).stdout == "inactive\n"


def test_remove_keeps_the_configuration_and_purge_nothing(
    bare_machine: Container, package: Path
) -> None:
    bare_machine.run("apt-get", "install", "--yes", *DEPENDENCIES)
    before = files(bare_machine)
    install(bare_machine, package)
    bare_machine.run("apt-get", "remove", "--yes", "tcpupperd")
    assert "LISTEN" not in bare_machine.run("ss", "-tln")
    assert bare_machine.show(SERVICE, "LoadState") == "not-found"
    bare_machine.run("test", "-e", CONFIGURATION)
    bare_machine.run("apt-get", "purge", "--yes", "tcpupperd", "python3-outlive")
    assert files(bare_machine) - before == set()
    assert bare_machine.run("systemctl", "is-system-running") == "running"


def test_installs_again_after_purge(machine: Container, package: Path) -> None:
    machine.run("apt-get", "purge", "--yes", "tcpupperd")
    install(machine, package)
    until(lambda: answer(machine, "hello\n") == "HELLO")


def newer_package(machine: Container, package: Path) -> list[str]:
    """The same package and its library under a later version."""
    return with_version(machine, [f"/mnt/{path.name}" for path in both(package)], "+newer")


def with_version(machine: Container, files: list[str], suffix: str) -> list[str]:
    """The same packages, with something added to their version, as each requires of the other."""
    script = (
        'dpkg-deb --raw-extract "$0" "$1" && '
        'sed -i -e "/^Version:/s/$/$2/" -e "s/outlive (= [^)]*/&$2/" "$1/DEBIAN/control" && '
        'dpkg-deb --build "$1" "$1.deb"'
    )
    found = []
    for number, file in enumerate(files):
        folder = f"/tmp/repacked{number}{suffix}"
        machine.run("sh", "-c", script, file, folder, suffix)
        found.append(f"{folder}.deb")
    return found


def files(machine: Container) -> set[str]:
    """Every file of the system but those in which it keeps the history of any package."""
    history = ("/var/cache", "/var/lib/apt", "/var/lib/dpkg", "/var/log", "/tmp", "/run", "/proc")
    pruned = [word for folder in (*history, "/sys", "/dev") for word in ("-path", folder, "-o")]
    found = machine.run("find", "/", "(", *pruned[:-1], ")", "-prune", "-o", "-print")
    return set(found.splitlines())
