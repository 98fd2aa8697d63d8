"""The wheel and the sdist, built by make wheel and used on a Debian with nothing but Python."""

import re
import zipfile
from pathlib import Path

import pytest

from system.test_readme import GET_MAKE, clone, newcomer, registry_access

__all__ = ["clone"]

SCRIPT = f"""
{GET_MAKE}
make wheel
python3 -m venv /tmp/installed
/tmp/installed/bin/pip install --quiet dist/wheel/*.whl
cd /tmp
installed/bin/tcpupperd --check
installed/bin/tcpupper --version
ls installed/share/man/man8/tcpupperd.8
mkdir sdist && tar --extract --file /mnt/dist/wheel/*.tar.gz --directory sdist
cd sdist/tcpupperd-*
/mnt/.venv/bin/pytest -q tests/unit
"""


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_wheel_and_sdist(release: str, clone: Path) -> None:
    output = newcomer(release, clone, SCRIPT, *registry_access())
    assert "tcpupperd: the configuration is good" in output
    assert re.search(r"^\d+ passed", output, re.MULTILINE)
    (wheel,) = (clone / "dist/wheel").glob("*.whl")
    allowed = r"tcpupperd/[\w/]+\.(py|typed)|tcpupperd-[\d.]+\.dist-info/.*|.*/share/man/.*"
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if not re.fullmatch(allowed, name)] == []
