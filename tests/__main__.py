"""Runs the tests: python3 tests [pytest's options and files]; without any, all but the slow ones.

It needs Python 3.11 and nothing else. Tests that need anything else are skipped, and what they
need is shown.
"""

import subprocess
import sys

from environment import TREE, give_back, python


def main() -> int:
    try:
        done = subprocess.run([python(), "-m", "pytest", *sys.argv[1:]], cwd=TREE, check=False)
    finally:
        give_back()
    if not sys.argv[1:]:
        print(
            "Not run: the system tests, which boot Debian in containers"
            " (sudo python3 tests tests/system)."
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
