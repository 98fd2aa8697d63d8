"""Reports the tests that a run has skipped."""

import gc
import os
import re
from collections.abc import Generator
from typing import Any

import pytest


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


def pytest_collection_finish() -> None:
    """What has been imported stays: the tests that have garbage collected need not wait until the
    collector has looked at all of it."""
    gc.freeze()


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
