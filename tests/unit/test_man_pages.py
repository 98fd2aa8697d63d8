"""The manual pages refer only to sections and pages that exist."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).parents[2] / "data/man"
PAGES = sorted(path.name for path in FOLDER.iterdir())


class Reference(NamedTuple):
    """A section that a page refers to, and the page that contains it, or "" for the same page."""

    section: str
    page: str


def sections(text: str) -> set[str]:
    return set(re.findall(r"^\.S[hs] (.*)$", text, re.MULTILINE))


def references(text: str) -> list[Reference]:
    """`.Sx SECTION`, also within a line of other macros, and what follows: `in` and `.Xr PAGE`."""
    section = r"(?:^\.|(?<= ))Sx ([A-Z][A-Z ]*[A-Z])(?: [.,;:)])?$"
    page = r"(?:\nin\n\.Xr (\S+) (\d))?"
    found = re.findall(section + page, text, re.MULTILINE)
    return [Reference(one, f"{name}.{number}" if name else "") for one, name, number in found]


def test_references_are_found() -> None:
    text = ".Sx ONE .\n.Pq but see Sx TWO WORDS .\nfoo\n.Sx THREE\nin\n.Xr page 8 ,\n"
    expected = [Reference("ONE", ""), Reference("TWO WORDS", ""), Reference("THREE", "page.8")]
    assert references(text) == expected


@pytest.mark.parametrize("page", PAGES)
def test_sections_that_a_page_refers_to_exist(page: str) -> None:
    text = (FOLDER / page).read_text()
    found = references(text)
    assert len(found) == len(re.findall(r"\bSx ", text))
    for section, other in found:
        assert section in sections((FOLDER / (other or page)).read_text()), section


@pytest.mark.parametrize("page", PAGES)
def test_references_to_pages_of_this_project_are_valid(page: str) -> None:
    named = re.findall(r"\bXr (tcpupper\S*) (\d)", (FOLDER / page).read_text())
    assert named
    assert {f"{name}.{number}" for name, number in named} <= set(PAGES)
