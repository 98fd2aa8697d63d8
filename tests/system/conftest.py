"""What every system test gets: Debian 12 or 13, booted, with this tree's package installed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from system.build import both, build_package, run_offline
from system.container import Container, booted
from system.roots import RELEASES, Root

TOOLS = ("git", "make", "mmdebstrap", "nsenter", "setpriv", "systemd-nspawn", "unshare")
COMPILE = "gcc -O2 -Wall -Wextra -Werror -o /mnt/clients /mnt/tcpupperd/tests/load/clients.c"


def pytest_sessionstart(session: pytest.Session) -> None:
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if os.geteuid() != 0 or missing:
        lacking = ", ".join(missing) or "nothing but root"
        install = "sudo apt-get install git make mmdebstrap systemd-container"
        again = "sudo python3 tests tests/system"
        pytest.exit(f"system tests lack {lacking}: {install if missing else again}", 4)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped system test proves nothing and would go unnoticed, so it is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def package(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of this tree, built for the release."""
    return build_package(release, tmp_path_factory.mktemp(release))


@pytest.fixture(scope="session")
def program(release: str, package: Path) -> str:
    """The load generator, as it is called inside."""
    run_offline(release, package.parent, COMPILE)
    return "/mnt/clients"


@pytest.fixture
def bare_machine(release: str, package: Path) -> Iterator[Container]:
    """A booted machine with the package in /mnt, not installed."""
    with booted(Root(release, "booted"), package.parent) as machine:
        yield machine


@pytest.fixture
def machine(bare_machine: Container, package: Path) -> Container:
    """A booted machine with the package installed."""
    install(bare_machine, package)
    return bare_machine


def install(machine: Container, package: Path) -> None:
    files = [f"/mnt/{path.name}" for path in both(package)]
    machine.run("apt-get", "install", "--yes", *files)
