"""The tests of what depends on the turn, once more: with the one in Python, where the C module is
built, which all other runs use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tcpupperd.serving.turn import SWITCH, python_turn, turn

HERE = Path(__file__).parent
FILES = (
    "closing",
    "ends",
    "faults",
    "handover_stop",
    "limits",
    "oracle",
    "resets",
    "restart",
    "hooks",
    "server_limits",
    "server_timeouts",
    "serving",
    "slow_readers",
    "socketserver",
    "timeouts",
    "transfer",
    "work",
)


@pytest.mark.skipif(turn is python_turn, reason="the C module is not used anyway")
@pytest.mark.parametrize("name", FILES)
def test_without_the_c_module(name: str) -> None:
    done = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / f"test_{name}.py"),
        cwd=HERE.parents[1],
        env={**os.environ, SWITCH: "1"},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    print(done.stdout)
