"""Runs the tests: python3 tests [pytest's options and files]; without any, all but the slow ones.

It needs Python 3.11 and nothing else. Tests that need anything else are skipped, and what they
need is shown.
"""

import os
import subprocess
import sys

from environment import PYTHON, TREE, give_back, python


def main() -> int:
    try:
        interpreter = python()
        options = sys.argv[1:] or side_by_side(interpreter)
        command = [interpreter, "-m", "pytest", *options]
        done = subprocess.run(command, cwd=TREE, env=environment(), check=False)
    finally:
        give_back()
    if not sys.argv[1:]:
        print(
            "Not run: the system tests, which boot Debian in containers"
            " (sudo python3 tests tests/system)."
        )
    return done.returncode


def environment() -> dict[str, str]:
    """That of the run, in which a thousand Pythons are started. If none may keep the modules that
    it has compiled, as in some images of containers, each compiles all of them."""
    return {name: os.environ[name] for name in os.environ if name != "PYTHONDONTWRITEBYTECODE"}


def side_by_side(interpreter: str) -> list[str]:
    """Options for several tests at a time, by pytest-xdist, which the virtual environment has:
    much of their time is spent waiting."""
    processes = 3 * (os.cpu_count() or 1)
    return ["-n", str(processes), "--dist", "worksteal"] if interpreter == str(PYTHON) else []


if __name__ == "__main__":
    sys.exit(main())
