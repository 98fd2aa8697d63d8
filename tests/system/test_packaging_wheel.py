"""The wheel and the sdist, built by make wheel and used on a Debian with Python and a compiler."""

import re
import zipfile
from pathlib import Path

import pytest

from system.test_readme import GET_MAKE, clone, newcomer, registry_access
from tcpupperd import __version__

__all__ = ["clone"]

FAST_PATH = "from tcpupperd.serving import fast_path; print(fast_path.implementation)"

SCRIPT = f"""
{GET_MAKE}
apt-get -qq install --yes --no-install-recommends gcc libc6-dev python3-dev >/dev/null
make wheel
python3 -m venv /tmp/installed
CC=/nonexistent /tmp/installed/bin/pip install --quiet dist/*.whl
python3 -m venv /tmp/plain
CC=/nonexistent /tmp/plain/bin/pip install --quiet dist/*.tar.gz
cd /tmp
installed/bin/tcpupperd --check
installed/bin/python -c {FAST_PATH!r}
plain/bin/python -c {FAST_PATH!r}
installed/bin/tcpupper --version
ls installed/share/man/man8/tcpupperd.8
mkdir sdist && tar --extract --file /mnt/dist/*.tar.gz --directory sdist
cd sdist/tcpupperd-*
/mnt/.venv/bin/pytest -q tests/unit
"""


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_wheel_and_sdist(release: str, clone: Path) -> None:
    output = newcomer(release, clone, SCRIPT, *registry_access())
    assert "Deprecat" not in output
    assert len(list((clone / "dist").iterdir())) == 2
    assert "tcpupperd: the configuration is valid" in output
    said = re.findall("^(?:not )?using the C module$", output, re.MULTILINE)
    assert said == ["using the C module", "not using the C module"]
    assert re.search(r"^\d+ passed", output, re.MULTILINE)
    (wheel,) = (clone / "dist").glob("*.whl")
    assert re.search(r"-cp311-abi3-manylinux[\w.]+\.whl$", wheel.name)
    allowed = (
        r"(outlive|tcpupperd)/[\w/]+\.(html\.in|py|typed|abi3\.so)"
        r"|tcpupperd-[\w.]+\.dist-info/.*|.*/share/man/.*"
    )
    metadata = zipfile.ZipFile(wheel).read(f"tcpupperd-{__version__}.dist-info/METADATA").decode()
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "![" not in metadata  # pictures, whose addresses are relative
    assert re.findall(r"\]\((?!https:|#)", metadata) == []
    files = [one.filename for one in zipfile.ZipFile(wheel).infolist() if not one.is_dir()]
    assert [name for name in files if not re.fullmatch(allowed, name)] == []
