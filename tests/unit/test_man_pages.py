"""The manual pages refer only to sections and pages that exist."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from documents import ROOT, documents

FOLDER = ROOT / "data/man"
PAGES = sorted(path.name for path in FOLDER.iterdir())

#: The pages of others that ours refer to, by the Debian packages that contain them.
OTHERS = {
    "coreutils": ("nohup.1", "tr.1"),
    "iputils-ping": ("ping.8",),
    "libreadline-dev": ("readline.3",),
    "libsystemd-dev": ("sd-daemon.3", "sd_listen_fds.3", "sd_notify.3", "sd_watchdog_enabled.3"),
    "manpages": ("tcp.7", "unix.7"),
    "manpages-dev": ("flock.2", "prctl.2", "syslog.3"),
    "netcat-openbsd": ("nc.1",),
    "procps": ("kill.1", "ps.1", "top.1"),
    "systemd": (
        *("daemon.7", "journalctl.1", "systemd.exec.5", "systemd.service.5", "systemd.socket.5"),
        *("systemd.journal-fields.7", "systemd.resource-control.5"),
    ),
}


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
def test_pages_that_a_page_refers_to_exist(page: str) -> None:
    named = re.findall(r"\bXr (\S+) (\d)\b", (FOLDER / page).read_text())
    assert named
    others = {other for pages in OTHERS.values() for other in pages}
    assert {f"{name}.{number}" for name, number in named} <= {*PAGES, *others}


@pytest.mark.parametrize("package", OTHERS)
def test_packages_contain_the_pages(package: str) -> None:
    """If any of them is installed here, all are."""
    missing = {page for page in OTHERS[package] if not installed(page)}
    assert not missing or missing == set(OTHERS[package])


def installed(page: str) -> bool:
    return any(Path(f"/usr/share/man/man{page[-1]}").glob(f"{page}*"))


@pytest.mark.parametrize("page", PAGES)
def test_sections_that_other_texts_name_exist(page: str) -> None:
    """As in: see COUNTERS in tcpupperd(8)."""
    name, _, number = page.rpartition(".")
    reference = rf"\b([A-Z]+(?: [A-Z]+)*)\s+in\s+{re.escape(name)}\({number}\)"
    texts = [*documents(), *ROOT.glob("tcpupperd/**/*.py"), ROOT / "data/tcpupperd.toml"]
    named = {section for path in texts for section in re.findall(reference, path.read_text())}
    assert named <= sections((FOLDER / page).read_text())
    assert named or page != "tcpupperd.8"
