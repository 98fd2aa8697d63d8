"""What is built from the source by other means than a virtual environment: make install, noopt."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from integration.daemon import ROOT
from tcpupperd import __version__
from tools import need


def make(tmp_path: Path, *words: str) -> None:
    """Run make in this checkout, which is left as it is."""
    subprocess.run(
        [need("make"), "--silent", *words, f"PYTHON={sys.executable}", f"STAGE={tmp_path}/stage"],
        cwd=ROOT,
        check=True,
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder in which `make install` has installed everything, as below /usr/local."""
    root = tmp_path / "root"
    words = (f"prefix={root}", f"sysconfdir={root}/etc", f"python={sys.executable}")
    make(tmp_path, "install", *words)
    return root


def test_installed_commands_run(installed: Path) -> None:
    """With the installed modules: -I leaves out everything else that is in this checkout."""
    for command in ("sbin/tcpupperd", "bin/tcpupper"):
        said = subprocess.check_output([installed / command, "--version"], cwd="/", text=True)
        assert f" {__version__}" in said


def test_installed_units_name_what_is_installed(installed: Path) -> None:
    need("systemd-analyze")
    units = [
        path.rename(path.with_name(path.name.replace("@.", "@7777.")))
        for path in (installed / "lib/systemd/system").iterdir()
    ]
    assert len(units) == 10
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
    service = (installed / "lib/systemd/system/tcpupperd.service").read_text()
    for name in ("ExecPaths", "BindReadOnlyPaths"):
        [paths] = re.findall(rf"^{name}=(.*/tcpupperd)$", service, re.MULTILINE)
        assert {f"{installed}/sbin/tcpupperd", f"{installed}/lib/tcpupperd"} <= {*paths.split()}
    assert f"<{installed}/lib/tcpupperd/release-listeners'" in service
    assert (installed / "lib/tcpupperd/release-listeners").exists()


def test_packagers_choose_the_folders(tmp_path: Path) -> None:
    folders = ("prefix=/usr", "libdir=/usr/lib64", "sbindir=/usr/bin", "unitdir=/units")
    make(tmp_path, "install", f"DESTDIR={tmp_path}/root", *folders)
    root = tmp_path / "root"
    assert (root / "usr/lib64/tcpupperd/tcpupperd/cli.py").exists()
    assert (root / "etc/tcpupperd/tcpupperd.toml").exists()
    service = (root / "units/tcpupperd.service").read_text()
    assert "\nExecStart=/usr/bin/tcpupperd --config /etc/tcpupperd/tcpupperd.toml\n" in service
    written = [path for path in root.rglob("*") if path.is_file()]
    assert [path for path in written if str(tmp_path).encode() in path.read_bytes()] == []


@pytest.mark.parametrize(("flags", "optimised"), [("-O2", True), ("-O0", False)])
def test_c_module_is_optimised_unless_told_not_to(
    tmp_path: Path, flags: str, optimised: bool
) -> None:
    """DEB_BUILD_OPTIONS=noopt sets -O0."""
    need("cc")
    told = subprocess.check_output(
        [
            *(sys.executable, "setup.py", "build_ext"),
            *("--build-lib", tmp_path, "--build-temp", tmp_path),
        ],
        cwd=ROOT,
        env={**os.environ, "CFLAGS": flags},
        text=True,
    )
    assert "_fast_path.c" in told
    assert ("-O3" in told) == optimised
