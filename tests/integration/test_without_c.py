"""Repeats the tests that depend on the fast path with the one in Python, if the C module is built,
which all other runs use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tcpupperd.serving.fast_path import SWITCH, fast_path, python_fast_path

HERE = Path(__file__).parent
#: Those in which the fast path decides what a client sees: what it answers, how it ends, how it
#: fails, what it costs. The rest, such as restarts, only moves its results. Each group of them is
#: one run.
TESTS = {
    "answers": ("oracle.py", "serving.py"),
    "ends": (
        *("ends.py", "hooks.py", "slow_readers.py"),
        "faults.py::test_draining_answers_no_more_of_one_client_in_a_turn_than_serving",
    ),
    "costs": ("work.py", "supervisor.py::test_idle_daemon_makes_no_system_call"),
}


@pytest.mark.skipif(fast_path is python_fast_path, reason="the C module is not used anyway")
@pytest.mark.parametrize("tests", TESTS.values(), ids=list(TESTS))
def test_without_the_c_module(tests: tuple[str, ...]) -> None:
    paths = (f"{HERE}/test_{name}" for name in tests)
    done = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths),
        cwd=HERE.parents[1],
        env={**os.environ, SWITCH: "1"},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
