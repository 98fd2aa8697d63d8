"""Style, types, man pages and units, checked by the tools made for it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import need

ROOT = Path(__file__).parents[2]


def run(*command: str | Path) -> tuple[int, str]:
    """The exit status of a tool and what it says."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def check(*command: str | Path) -> None:
    """Fail with what a tool says, if it says no."""
    status, told = run(*command)
    assert status == 0, told


def need_module(name: str) -> None:
    if not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed (pip install {name})")


def test_style() -> None:
    need_module("ruff")
    check(sys.executable, "-m", "ruff", "check")


def test_format() -> None:
    need_module("ruff")
    check(sys.executable, "-m", "ruff", "format", "--check", "--diff")


def test_types() -> None:
    need_module("mypy")
    check(sys.executable, "-m", "mypy")


@pytest.mark.parametrize("page", sorted((ROOT / "data/man").iterdir()), ids=lambda page: page.name)
def test_man_page(page: Path) -> None:
    need("mandoc")
    check("mandoc", "-T", "lint", "-W", "warning", page)


def test_units(tmp_path: Path) -> None:
    need("systemd-analyze")
    units = [tmp_path / name for name in ("tcpupperd.service", "tcpupperd.socket")]
    for unit in units:
        # Neither daemon nor kill need be installed here; a command that is missing is an error.
        text = (ROOT / "systemd" / unit.name).read_text()
        unit.write_text(re.sub(r"^(Exec\w+=)\S*bin/\w+", r"\1/bin/true", text, flags=re.MULTILINE))
    # It only warns of settings that it does not know, and has status 0 all the same.
    assert run("systemd-analyze", "verify", "--man=no", *units) == (0, "")
