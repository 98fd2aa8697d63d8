"""The manual of outlive: its first program, and the test for it, as a reader writes them."""

import os
import subprocess
import sys
from pathlib import Path
from subprocess import STDOUT

from documents import ROOT, blocks
from waiting import DEADLINE

MANUAL = (ROOT / "outlive/README.md").read_text()


def test_example_of_a_test_passes(tmp_path: Path) -> None:
    """In the folder of the program, which must not hide a module that pytest needs."""
    [program] = [one for one in blocks(MANUAL) if one.file.endswith(".py")]
    [test] = [one for one in blocks(MANUAL) if "def test_" in one.text]
    (tmp_path / Path(program.file).name).write_text(program.text)
    (tmp_path / "test_restart.py").write_text(test.text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "output").open("w") as output:
        status = subprocess.call(
            command, cwd=tmp_path, env=environ, stdout=output, stderr=STDOUT, timeout=DEADLINE
        )
    printed = (tmp_path / "output").read_text()
    assert status == 0, printed
    assert "1 passed" in printed
