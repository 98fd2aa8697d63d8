"""The wheel and the sdist, built by make wheel and used on a Debian with Python and a compiler."""

import re
import zipfile
from pathlib import Path

import pytest

from system.test_readme import GET_MAKE, clone, newcomer, registry_access

__all__ = ["clone"]

FAST_PATH = "from tcpupperd.serving import fast_path; print(fast_path.implementation)"

SCRIPT = f"""
{GET_MAKE}
apt-get -qq install --yes --no-install-recommends gcc libc6-dev python3-dev >/dev/null
make wheel
python3 -m venv /tmp/installed
/tmp/installed/bin/pip install --quiet dist/wheel/*.whl
python3 -m venv /tmp/plain
CC=/nonexistent /tmp/plain/bin/pip install --quiet dist/wheel/*.tar.gz
cd /tmp
installed/bin/tcpupperd --check
installed/bin/python -c {FAST_PATH!r}
plain/bin/python -c {FAST_PATH!r}
installed/bin/tcpupper --version
ls installed/share/man/man8/tcpupperd.8
mkdir sdist && tar --extract --file /mnt/dist/wheel/*.tar.gz --directory sdist
cd sdist/tcpupperd-*
/mnt/.venv/bin/pytest -q tests/unit
"""


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_wheel_and_sdist(release: str, clone: Path) -> None:
    output = newcomer(release, clone, SCRIPT, *registry_access())
    assert "tcpupperd: the configuration is valid" in output
    said = re.findall("^(?:not )?using the C module$", output, re.MULTILINE)
    assert said == ["using the C module", "not using the C module"]
    assert re.search(r"^\d+ passed", output, re.MULTILINE)
    (wheel,) = (clone / "dist/wheel").glob("*.whl")
    assert re.search(r"-cp311-abi3-manylinux[\w.]+\.whl$", wheel.name)
    allowed = (
        r"tcpupperd/[\w/]+\.(html\.in|py|typed|abi3\.so)"
        r"|tcpupperd-[\d.]+\.dist-info/.*|.*/share/man/.*"
    )
    files = [one.filename for one in zipfile.ZipFile(wheel).infolist() if not one.is_dir()]
    assert [name for name in files if not re.fullmatch(allowed, name)] == []
