"""What takes minutes, and so runs only with SOAK=1: a release upgrade, an upgrade from 0.1.0 and
back, other architectures.

The last need "sudo apt-get install arch-test qemu-user".
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from system.build import both, build_0_1_0, copy_tree, run_offline
from system.conftest import install
from system.container import Container, booted
from system.roots import CROSS, RELEASES, TREE, Root
from system.service import CONFIGURATION, SERVICE, Conversation, answer, is_active
from waiting import until

#: Not by skipping: a skipped system test is a failure.
__test__ = bool(os.environ.get("SOAK"))

UPGRADE_TIMEOUT = 1500
CONNECTIONS = 100
# Those that qemu-user can run, which lacks some socket options and cannot protect memory.
BIG_ENDIAN = (
    *("tests/unit/test_scoreboard.py", "tests/unit/test_counters.py"),
    "tests/unit/test_handover.py::test_record_is_the_same_on_every_machine",
    "--deselect=tests/unit/test_scoreboard.py"
    "::test_worker_can_read_but_not_write_the_counts_of_the_supervisor",
)
# Only what the root has in apt's cache.
UPGRADE = (
    "apt-get full-upgrade --yes --no-install-recommends -o Dpkg::Options::=--force-confold"
    " </dev/null"
)


#: What an administrator answers who keeps the file.
INSTALL = ("apt-get", "install", "--yes", "-o", "Dpkg::Options::=--force-confold")


@pytest.mark.parametrize("release", ["bookworm"], indirect=True)
def test_release_upgrade_loses_no_connection(release: str, package: Path) -> None:
    """Neither during the upgrade, which replaces Python, nor at restarts before and after it."""
    ping = ("tcpupper", "--ping", f"--connections={CONNECTIONS}", "--interval=0.2", "--quiet")
    with booted(Root(release, "upgrade"), package.parent) as machine:
        install(machine, package)
        with (
            machine.popen(*ping, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as client,
            ExitStack() as stack,
        ):
            stack.callback(client.kill)
            machine.run("systemctl", "restart", SERVICE)
            with machine.popen("sh", "-ec", UPGRADE, stdout=subprocess.PIPE) as upgrade:
                output, _ = upgrade.communicate(timeout=UPGRADE_TIMEOUT)
            assert upgrade.returncode == 0, output
            for _ in range(3):
                machine.run("systemctl", "restart", SERVICE)
                assert answer(machine, "hello\n") == "HELLO"
            machine.run("pkill", "--signal=INT", "--exact", "tcpupper")
            summary, _ = client.communicate(timeout=60)
        assert machine.run("cat", "/etc/debian_version").startswith("13")
        assert client.returncode == 0, summary  # nothing was lost, and no connection ended


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_upgrade_from_0_1_0_and_back(
    release: str, bare_machine: Container, package: Path, tmp_path: Path
) -> None:
    """With a file that the new version rejects and the old one has not read yet, which costs
    nothing; and back, which ends the connections, but no service."""
    machine, older = bare_machine, package.parent / "0.1.0.deb"
    shutil.copy(build_0_1_0(release, tmp_path), older)
    instance = "tcpupperd@7777.service"
    install(machine, older)
    machine.write("/etc/tcpupperd/7777.toml", "")
    machine.run("systemctl", "start", "tcpupperd@7777.socket", instance)
    until(lambda: is_active(machine, SERVICE) and is_active(machine, instance))
    running = [machine.show(unit, "MainPID") for unit in (SERVICE, instance)]
    with pinging(machine) as clients, pinging(machine, "--port=7777") as others:
        machine.write(CONFIGURATION, "wrokers = 1\n")
        said = machine.run(*INSTALL, *(f"/mnt/{path.name}" for path in both(package)))
        print(said)
        assert f"{SERVICE} keeps running version 0.1.0-1; correct {CONFIGURATION} and" in said
        assert machine.show(SERVICE, "MainPID") == running[0]
        assert machine.show(instance, "MainPID") != running[1]
        assert is_active(machine)
        machine.write(CONFIGURATION, "workers = 1\n")
        machine.run("systemctl", "restart", SERVICE)
        assert machine.show(SERVICE, "MainPID") != running[0]
        machine.run("systemctl", "restart", SERVICE, instance)
        for one in (clients, others):
            one.send_signal(signal.SIGINT)
            summary, _ = one.communicate(timeout=60)
            print(summary)
            assert one.returncode == 0  # nothing was lost, and no connection ended
    with Conversation(machine) as client, Conversation(machine, "--port=7777") as other:
        assert (client.ask("one"), other.ask("other")) == ("ONE", "OTHER")
        print(machine.run(*INSTALL, "--allow-downgrades", f"/mnt/{older.name}"))
        assert client.end() == other.end() == ""
    assert answer(machine, "hello\n") == "HELLO"
    assert machine.run("tcpupper", "--port=7777", "hello") == "HELLO"
    assert machine.run("tcpupperd", "--version") == "tcpupperd 0.1.0"
    for unit in (SERVICE, instance):
        until(partial(is_active, machine, unit))
    assert machine.run("systemctl", "list-units", "--no-legend", "--failed") == ""


@contextmanager
def pinging(machine: Container, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The client of this tree, with many connections to the container; 0.1.0 has no --ping."""
    ping = ("--ping", f"--connections={CONNECTIONS}", "--interval=0.2", "--quiet", *options)
    command = ("nsenter", f"--target={machine.leader}", "--net", sys.executable, "-m")
    with subprocess.Popen(
        (*command, "tcpupperd.client", *ping),
        cwd=TREE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_builds_on_i386(release: str, tmp_path: Path) -> None:
    """With its unit tests, as Debian's builders do."""
    copy_tree(tmp_path)
    build = "cd /mnt/tcpupperd && linux32 dpkg-buildpackage --build=binary --no-sign"
    output = run_offline(release, tmp_path, build, "i386")
    assert " passed" in output
    assert list(tmp_path.glob("tcpupperd_*_i386.deb"))


@pytest.mark.parametrize("architecture", CROSS)
@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_cross_builds(release: str, architecture: str, tmp_path: Path) -> None:
    copy_tree(tmp_path)
    build = (
        f"cd /mnt/tcpupperd && DEB_BUILD_OPTIONS=nocheck dpkg-buildpackage"
        f" --host-arch={architecture} --build-profiles=cross,nocheck --build=binary --no-sign"
    )
    run_offline(release, tmp_path, build, architecture)
    assert list(tmp_path.glob(f"tcpupperd_*_{architecture}.deb"))


@pytest.mark.parametrize("release", ["bookworm"], indirect=True)
def test_shared_memory_and_records_on_a_big_endian_machine(release: str) -> None:
    root = Root(release, "s390x").path()
    python = ("qemu-s390x", "-L", root, root / "usr/bin/python3.11")
    order = subprocess.check_output([*python, "-c", "import sys; print(sys.byteorder)"])
    assert order == b"big\n"
    options = ("-q", "-p", "no:cacheprovider")
    subprocess.run([*python, "-m", "pytest", *options, *BIG_ENDIAN], cwd=TREE, check=True)
