"""What takes minutes, and so runs only with SOAK=1: a release upgrade, other architectures."""

import os
import subprocess
from pathlib import Path

import pytest

from system.conftest import install
from system.container import booted
from system.roots import Root
from system.service import SERVICE, answer

#: Not by skipping: a skipped system test is a failure.
__test__ = bool(os.environ.get("SOAK"))

UPGRADE_TIMEOUT = 1500
CONNECTIONS = 100
UPGRADE = "apt-get full-upgrade --yes -o Dpkg::Options::=--force-confold </dev/null"


@pytest.mark.parametrize("release", ["bookworm"], indirect=True)
def test_release_upgrade_loses_no_connection(release: str, package: Path) -> None:
    """Neither during the upgrade, which replaces Python, nor at restarts before and after it."""
    ping = ("tcpupper", "--ping", f"--connections={CONNECTIONS}", "--interval=0.2", "--quiet")
    with booted(Root(release, "upgrade"), package.parent) as machine:
        install(machine, package)
        with machine.popen(*ping, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as client:
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
