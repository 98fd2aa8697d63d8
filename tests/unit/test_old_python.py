"""Users of an unsupported Python get a one-line error."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tcpupperd

ROOT = Path(__file__).parents[2]
#: What an older Python reads before it can be told.
READ_FIRST = (tcpupperd.__file__, ROOT / "tests/__main__.py", ROOT / "tests/environment.py")

PRETEND = """
import runpy, sys
sys.version_info = (3, 10, 13, "final", 0)
sys.version = "3.10.13 (main)"
what = sys.argv.pop(1)
if what == "tests":
    runpy.run_path(what, run_name="__main__")
else:
    runpy.run_module(what, run_name="__main__")
"""


@pytest.mark.parametrize("what", ["tcpupperd", "tcpupperd.client", "tests"])
def test_one_line_tells_which_is_needed(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRETEND, what],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    told = "tcpupperd needs Python 3.11 or later; this is Python 3.10.13\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)


@pytest.mark.parametrize("path", READ_FIRST, ids=lambda path: Path(path).name)
def test_old_python_can_read_as_far_as_that(path: Path | str) -> None:
    ast.parse(Path(path).read_text(), feature_version=(3, 6))
