"""What all tests share: limits, and a report of the tests that a run has skipped."""

import fcntl
import os
import re
import resource
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from in_flight import locked

# By default, an example may take 200 ms, and the making of ten of them a second, which a busy
# machine does not always give them. Fixtures that are the same for all examples are meant so.
settings.register_profile(
    "bounded by examples, not by time",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("bounded by examples, not by time")
# For builds of packages: --hypothesis-profile=reproducible.
settings.register_profile("reproducible", settings(), derandomize=True, database=None)

# The usual limit is 1024, which is less than the connections that a test opens.
_, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard_limit), hard_limit))

# The path of a Unix socket, which may be 107 bytes long, has no room for a longer one.
if len(tempfile.gettempdir()) > 20 and os.access("/tmp", os.W_OK):
    tempfile.tempdir = os.environ["TMPDIR"] = "/tmp"

# The checkout may belong to another user, so that nothing can be kept there from run to run.
if not os.access(Path(__file__).parent, os.W_OK):
    os.environ |= {"RUFF_NO_CACHE": "true", "MYPY_CACHE_DIR": os.devnull}

# What a shell runs in the background ignores signals, as does what nohup(1) runs, and the programs
# that the tests start would inherit this. They do not inherit a handler that does nothing.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


@pytest.fixture
def many_in_flight() -> Iterator[None]:
    """For tests with more than fifty descriptors in flight at a time. Those with a `small_limit`
    have room for what others hand over in passing, but not for so many."""
    with locked(fcntl.LOCK_SH):
        yield


@pytest.fixture
def small_limit() -> Iterator[None]:
    """For tests of processes whose limit of descriptors is so small that they could send none
    while another test has `many_in_flight`."""
    with locked(fcntl.LOCK_EX):
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    """Where MAY_SKIP is set, as .ci/run does, a skipped test is a failure, unless this regular
    expression matches the reason: otherwise, it would go unnoticed."""
    report = (yield).get_result()
    if report.skipped and not hasattr(report, "wasxfail") and "MAY_SKIP" in os.environ:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not re.fullmatch(os.environ["MAY_SKIP"], reason):
            report.outcome = "failed"
            report.longrepr = f"skipped, which MAY_SKIP does not allow: {reason}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one line what installs the programs for want of which tests were skipped."""
    skipped = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    packages = {
        package
        for reason in skipped
        if (found := re.search(r"\(apt-get install (.+)\)", reason))
        for package in found[1].split()
    }
    if packages:
        install = f"sudo apt-get install {' '.join(sorted(packages))}"
        terminalreporter.write_line(f"{len(skipped)} skipped; to run them too: {install}")
