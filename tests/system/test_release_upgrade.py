"""The package during the upgrade to Debian's next release; test_soak_packages.py makes it."""

import subprocess
from pathlib import Path

import pytest

from system.build import both
from system.container import SHELL, nspawn
from system.roots import NEXT, RELEASES, TESTING, Root

in_every_release = pytest.mark.parametrize("release", [*RELEASES, TESTING], indirect=True)
to_the_next = pytest.mark.parametrize("release", NEXT, indirect=True)


@in_every_release
def test_depends_on_any_later_python(package: Path) -> None:
    """On every release: dh_python3 would add an upper bound, or leave out the lower one."""
    for path in both(package):
        depends = subprocess.check_output(["dpkg-deb", "--field", path, "Depends"], text=True)
        relations = [one for one in depends.strip().split(", ") if one.startswith("python3 ")]
        assert relations == ["python3 (>= 3.11)"]


@to_the_next
def test_release_upgrade_keeps_the_package(release: str, package: Path) -> None:
    files = " ".join(f"/mnt/{path.name}" for path in both(package))
    script = f"dpkg --install {files}; apt-get --simulate full-upgrade"
    result = subprocess.run(
        nspawn(Root(release, "upgrade"), package.parent, "--private-network", *SHELL, script),
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "\nInst python3 " in result.stdout
    assert "Remv tcpupperd" not in result.stdout
    assert "Remv python3-outlive" not in result.stdout
