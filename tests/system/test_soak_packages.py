"""What takes minutes, and so runs only with SOAK=1: a release upgrade, other architectures.

The latter need "sudo apt-get install arch-test qemu-user".
"""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from system.build import copy_tree, run_offline
from system.conftest import install
from system.container import booted
from system.roots import TREE, Root
from system.service import SERVICE, answer

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
        assert " 0 lost, 0 wrong, 0 reconnected" in summary


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_builds_on_i386(release: str, tmp_path: Path) -> None:
    """With its unit tests, as Debian's builders do."""
    copy_tree(tmp_path)
    build = "cd /mnt/tcpupperd && linux32 dpkg-buildpackage --build=binary --no-sign"
    output = run_offline(release, tmp_path, build, "i386")
    assert " passed" in output
    assert list(tmp_path.glob("tcpupperd_*_i386.deb"))


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_builds_for_arm64(release: str, tmp_path: Path) -> None:
    copy_tree(tmp_path)
    build = (
        "cd /mnt/tcpupperd && DEB_BUILD_OPTIONS=nocheck dpkg-buildpackage --host-arch=arm64"
        " --build-profiles=cross,nocheck --build=binary --no-sign"
    )
    run_offline(release, tmp_path, build, "arm64")
    assert list(tmp_path.glob("tcpupperd_*_arm64.deb"))


@pytest.mark.parametrize("release", ["bookworm"], indirect=True)
def test_shared_memory_and_records_on_a_big_endian_machine(release: str) -> None:
    root = Root(release, "s390x").path()
    python = ("qemu-s390x", "-L", root, root / "usr/bin/python3.11")
    order = subprocess.check_output([*python, "-c", "import sys; print(sys.byteorder)"])
    assert order == b"big\n"
    options = ("-q", "-p", "no:cacheprovider")
    subprocess.run([*python, "-m", "pytest", *options, *BIG_ENDIAN], cwd=TREE, check=True)
