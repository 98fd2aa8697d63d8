"""Repeats the tests that depend on the turn with the one in Python, if the C module is built,
which all other runs use."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tcpupperd.serving.turn import SWITCH, python_turn, turn

HERE = Path(__file__).parent
FILES = (
    # The longest ones first.
    "restart",
    "timeouts",
    "server_timeouts",
    "handover_stop",
    "faults",
    "oracle",
    "proxy",
    "ends",
    "closing",
    "hooks",
    "limits",
    "resets",
    "server_limits",
    "serving",
    "slow_readers",
    "socketserver",
    "transfer",
    "work",
)

#: How many run at a time: they wait more than they work.
AT_ONCE = 3

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, "Future[Done]"]]:
    """The runs of all files that were selected."""
    selected = {item.name for item in request.session.items}
    with ThreadPoolExecutor(AT_ONCE) as executor:
        yield {
            name: executor.submit(run, name)
            for name in FILES
            if f"test_without_the_c_module[{name}]" in selected
        }
        executor.shutdown(cancel_futures=True)


def run(name: str) -> Done:
    return subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / f"test_{name}.py"),
        cwd=HERE.parents[1],
        env={**os.environ, SWITCH: "1"},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(turn is python_turn, reason="the C module is not used anyway")
@pytest.mark.parametrize("name", FILES)
def test_without_the_c_module(name: str, runs: dict[str, "Future[Done]"]) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout
    print(done.stdout)
