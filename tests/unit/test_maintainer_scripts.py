"""The Debian package's scripts, in another root than the host's (DPKG_ROOT, see dpkg(1))."""

import os
import subprocess
from pathlib import Path

import pytest

from unit.test_project import in_debian

UNITS = "etc/systemd/system"
OF_INSTANCES = (
    "etc/tcpupperd/7777.toml",
    f"{UNITS}/multi-user.target.wants/tcpupperd@7777.service",
    f"{UNITS}/sockets.target.wants/tcpupperd@7777.socket",
    f"{UNITS}/tcpupperd@7777.service.wants/tcpupperd-metrics@7777.socket",
)
OF_ADMINISTRATORS = (
    "etc/tcpupperd/10-notes.toml",
    "etc/tcpupperd/7777.toml.orig",
    f"{UNITS}/sockets.target.wants/another.socket",
)


@pytest.mark.parametrize("action", ["purge", "remove"])
def test_purge_removes_instances_and_nothing_else(tmp_path: Path, action: str) -> None:
    for name in (*OF_INSTANCES, *OF_ADMINISTRATORS):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run("postrm", action, tmp_path)
    left = {str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()}
    assert left == {*OF_ADMINISTRATORS, *(OF_INSTANCES if action == "remove" else ())}


def test_purge_removes_the_folder_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "etc/tcpupperd").mkdir(parents=True)
    run("postrm", "purge", tmp_path)
    assert not (tmp_path / "etc/tcpupperd").exists()


def run(script: str, action: str, root: Path) -> None:
    subprocess.run(
        ["sh", "-s", "--", action],
        input=in_debian(f"tcpupperd.{script}"),
        env={**os.environ, "DPKG_ROOT": str(root)},
        check=True,
        text=True,
    )
