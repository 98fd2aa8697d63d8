"""The RPM package: built from the tarball, and run where the loader is in /usr/lib64.

Debian has rpmbuild, but none of Fedora's packages: the dependencies are not checked.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from release import debian_form
from system.build import make_tarball, run_offline
from system.container import Container, booted
from system.roots import TREE, Root
from system.service import SERVICE, SOCKET, Conversation, answer
from tcpupperd import __version__
from waiting import until

BUILD = (
    "rpmbuild -ta --nodeps --define '_topdir /mnt/rpmbuild' --define '_libdir /usr/lib64'"
    " --define '_unitdir /usr/lib/systemd/system'"
    " --define 'python3_sitelib /usr/lib/python3/dist-packages' /mnt/*.tar.gz;"
    " mkdir /mnt/files; cd /mnt/files; for file in /mnt/rpmbuild/RPMS/*/*.rpm; do"
    " rpm2cpio $file | cpio -id; done"
)
# As on Fedora, where the loader is no link to another folder.
MOVE_LOADER = """
loader=/usr/lib64/ld-linux-x86-64.so.2
real=$(readlink -f $loader)
cp $real $loader.new
mv $loader.new $loader
"""

pytestmark = pytest.mark.parametrize("release", ["trixie"], indirect=True)


@pytest.fixture(scope="module")
def rpm(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's files in `files`."""
    folder = tmp_path_factory.mktemp("rpm")
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", TREE, clone], check=True)
    make_tarball(clone).rename(folder / f"tcpupperd-{__version__}.tar.gz")
    run_offline(release, folder, BUILD)
    return folder


@pytest.fixture
def machine(release: str, rpm: Path) -> Iterator[Container]:
    """A booted machine with the package's files, and its loader in /usr/lib64."""
    with booted(Root(release, "booted"), rpm) as machine:
        machine.run("apt-get", "install", "--yes", "procps", "python3-sdnotify")
        machine.run("cp", "--archive", "/mnt/files/.", "/")
        machine.run("sh", "-ec", MOVE_LOADER)
        machine.run("systemctl", "daemon-reload")
        yield machine


def test_version_is_that_of_the_release_or_before_it(rpm: Path) -> None:
    names = sorted(path.name for path in rpm.glob("rpmbuild/RPMS/*/*.rpm"))
    version = f"{debian_form(__version__)}-1."
    assert names[0].startswith(f"python3-outlive-{version}")
    assert names[1].startswith(f"tcpupperd-{version}")
    assert len(names) == 2


def test_runs_where_the_loader_is_in_lib64(machine: Container) -> None:
    machine.run("test", "-e", "/usr/lib64/tcpupperd/tcpupperd/serving/_fast_path.abi3.so")
    units = (SERVICE, SOCKET, "tcpupperd@7777.service", "tcpupperd@7777.socket")
    assert machine.run("systemd-analyze", "verify", "--man=no", *units) == ""
    machine.run("systemctl", "enable", "--now", SOCKET, SERVICE)
    until(lambda: answer(machine, "hello\n") == "HELLO")
    with Conversation(machine) as client:
        assert client.ask("one") == "ONE"
        machine.run("systemctl", "restart", SERVICE)
        assert client.ask("two") == "TWO"
    machine.run("systemctl", "reload", SERVICE)
    maps = machine.run("cat", f"/proc/{machine.show(SERVICE, 'MainPID')}/maps")
    assert "/usr/lib64/ld-linux-x86-64.so.2" in maps
    assert "/usr/lib64/tcpupperd/tcpupperd/serving/_fast_path.abi3.so" in maps
    assert machine.show(SERVICE, "Result") == "success"
