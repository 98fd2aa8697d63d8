"""Reports the tests that a run has skipped."""

import os
import re
from collections.abc import Generator
from typing import Any

import pytest

from tools import PACKAGES, missed


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
    if missed:
        packages = " ".join(sorted({PACKAGES[tool] for tool in missed}))
        tools = ", ".join(sorted(missed))
        terminalreporter.write_line(
            f"Left out: what needs {tools} (sudo apt-get install {packages})."
        )
