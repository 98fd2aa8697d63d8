"""The package's own tests, run by autopkgtest(1) in a booted machine."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from system.build import both
from system.container import Container, booted
from system.roots import RELEASES, TESTING, Root
from system.service import SERVICE, drop_in

AUTOPKGTEST_TIMEOUT = 900
# The machine is a container, and is thrown away at the end: what autopkgtest cannot know of it.
PROMISES = "--ignore-restrictions=isolation-container,breaks-testbed"

LATE = "/opt/late.py"
READY_IS_TOLD_LATE = """
import runpy, sys, time
sys.path.insert(0, "/usr/lib/tcpupperd")
from outlive.notify import Notifier

tell = Notifier.ready

def tell_late(notifier):
    time.sleep(2)
    tell(notifier)

Notifier.ready = tell_late
sys.argv[1:] = ["--config", "/etc/tcpupperd/tcpupperd.toml"]
runpy.run_path("/usr/sbin/tcpupperd", run_name="__main__")
"""

pytestmark = pytest.mark.parametrize("release", [*RELEASES, TESTING], indirect=True)


@pytest.fixture
def testbed(release: str, package: Path) -> Iterator[Container]:
    """A booted machine with autopkgtest and the build dependencies, the package in /mnt."""
    with booted(Root(release, "autopkgtest"), package.parent) as machine:
        # Nothing more is needed, and apt-get would wait for archives that cannot be reached.
        machine.run("bash", "-c", "rm -rf /etc/apt/sources.list{,.d/*} /var/lib/apt/lists/*")
        yield machine


def test_package_tests_wait_for_readiness(machine: Container) -> None:
    """Which systemd may learn of later than the first clients."""
    machine.write(LATE, READY_IS_TOLD_LATE)
    drop_in(machine, SERVICE, f"[Service]\nExecStart=\nExecStart=/usr/bin/python3 {LATE}\n")
    machine.run("systemctl", "restart", SERVICE)
    for name in ("smoke", "socket-activation", "reload", "restart"):
        machine.run("sh", "-ec", f"cd /mnt/tcpupperd; AUTOPKGTEST_TMP=/tmp debian/tests/{name}")


def test_autopkgtests_pass(testbed: Container, package: Path) -> None:
    source = package.parent / "tcpupperd"
    with testbed.popen(
        *("autopkgtest", PROMISES, *(f"/mnt/{path.name}" for path in both(package))),
        *(f"/mnt/{source.name}/", "--", "null"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as run:
        output, _ = run.communicate(timeout=AUTOPKGTEST_TIMEOUT)
    print(output)
    names = re.findall(
        r"^Tests:((?:\n .*,)+)$", (source / "debian/tests/control").read_text(), re.M
    )
    expected = {*"".join(names).replace(",", "").split(), "pybuild-autopkgtest"}
    assert set(re.findall(r"^(\S+) +PASS", output, re.M)) == expected
    assert run.returncode == 0
