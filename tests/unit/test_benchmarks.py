"""Everything that the documentation says about speed follows from the results."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the installed modules are tested, which are without the benchmarks."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])


def test_tables_figure_and_documents_follow_from_the_results() -> None:
    from benchmarks.report import files
    from benchmarks.results import FILE, Results

    for path, text in files(Results.read(FILE.read_text())).items():
        assert path.read_text() == text, f"{path.name}: run python3 -m benchmarks.report"


def test_block_that_is_missing_is_an_error() -> None:
    from benchmarks.report import replaced

    text = "before\n<!-- measured: x -->\nold\n<!-- end -->\nafter\n"
    new = "before\n<!-- measured: x -->\n\nnew\n\n<!-- end -->\nafter\n"
    assert replaced(text, "x", "new\n") == new
    assert replaced(new, "x", "new\n") == new
    with pytest.raises(ValueError, match="0 blocks named 'y'"):
        replaced(text, "y", "new\n")
