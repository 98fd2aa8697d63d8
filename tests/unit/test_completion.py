"""data/completion/make.py as a command; what it writes is tried in shells by the system tests."""

import subprocess
import sys
from pathlib import Path

import pytest

MAKE = Path(__file__).parents[2] / "data/completion/make.py"


@pytest.mark.parametrize("arguments", [[], ["fish"], ["bash", "zsh"]])
def test_usage_is_told(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, MAKE, *arguments], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: make.py [-h] {bash,zsh}\nmake.py: error: ")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_printed(shell: str) -> None:
    assert "--listen" in subprocess.check_output([sys.executable, MAKE, shell], text=True)
