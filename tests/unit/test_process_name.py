"""What other programs show about a process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tcpupperd.serving.fast_path import SWITCH

ROOT = Path(__file__).parents[2]

#: Prints what ps(1) shows: before a change, meanwhile, also in a forked process, and after that.
PROGRAM = """
from pathlib import Path
import os
from tcpupperd.processes import process_name

def print_shown():
    words = Path("/proc/self/cmdline").read_bytes().rstrip(b"\\0").split(b"\\0")
    print(Path("/proc/self/comm").read_text().strip(), len(words), words[0].decode(), flush=True)

print_shown()
with process_name.shown_as("a name", LINE):
    print_shown()
    if not (child := os.fork()):
        print_shown()
        os._exit(0)
    os.waitpid(child, 0)
print_shown()
"""


@pytest.fixture(params=["c", "python"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C module, if it was built, and without."""
    if request.param == "python":
        monkeypatch.setenv(SWITCH, "1")


def shown(line: str, *arguments: str) -> list[str]:
    program = PROGRAM.replace("LINE", line)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.check_output(command, text=True, cwd=ROOT).splitlines()


@pytest.mark.parametrize("arguments", [(), ("one", "two")])
def test_name_and_line_are_changed_for_a_while(arguments: tuple[str, ...]) -> None:
    before, changed, forked, after = shown("'what it does'", *arguments)
    assert changed == forked == "a name 1 what it does"
    assert before == after
    assert before.endswith(f" {3 + len(arguments)} {sys.executable}")


def test_longer_line_does_not_reach_the_environment() -> None:
    before, changed, _, after = shown("'long ' * 10_000")
    assert changed.startswith("a name 1 long long")
    assert len(changed) < 2 * len(PROGRAM)
    assert before == after
