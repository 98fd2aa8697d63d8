"""Facts stated in several files agree."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tcpupperd import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Homepage"]
#: Other organisations whose addresses may appear in the documentation.
OTHERS = {"salsa.debian.org", "toml.io", "www.debian.org"}


def documents() -> Iterator[Path]:
    """The files that describe the project. A tarball of the source has no debian/."""
    yield from (ROOT / "LICENSE", ROOT / "pyproject.toml", *ROOT.glob("*.md"))
    for folder in ("data", "debian", "docs", "systemd"):
        for path in (ROOT / folder).rglob("*"):
            made = {"tcpupperd", "__pycache__"} & {*path.relative_to(ROOT / folder).parts[:-1]}
            if path.is_file() and path.suffix != ".png" and not made:
                yield path


def in_debian(name: str) -> str:
    path = ROOT / "debian" / name
    if not path.exists():
        pytest.skip("the tarball of the source is without debian/")
    return path.read_text()


def test_every_address_is_the_projects_or_of_a_known_other() -> None:
    for path in documents():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "a name, no address")
        for address in re.findall(r"https?://[^\s\"'<>)]+", text):
            parts = urlsplit(address)
            assert parts.scheme == "https", path
            assert address.startswith(ADDRESS) or parts.hostname in OTHERS, path


def test_every_mail_address_is_at_the_projects_or_an_example() -> None:
    for path in documents():
        for host in re.findall(r"<[\w.+-]+@([\w.-]+)>", path.read_text()):
            assert host in (urlsplit(ADDRESS).hostname, "example.org"), path


def test_debian_says_where_the_project_lives() -> None:
    assert f"\nHomepage: {ADDRESS}\n" in in_debian("control")
    assert f"\nSource: {ADDRESS}\n" in in_debian("copyright")


def test_debian_says_the_licence_of_the_project() -> None:
    ours = " ".join((ROOT / "LICENSE").read_text().partition("Permission")[2].split())
    theirs = in_debian("copyright").partition("Permission")[2]
    assert " ".join(theirs.replace("\n .\n", "\n").split()) == ours


def test_newest_changelog_entry_is_of_the_version() -> None:
    newest = re.match(r"tcpupperd \(([^)]*)-\d+\)", in_debian("changelog"))
    assert newest
    assert newest[1] == __version__


def test_news_tell_of_the_version() -> None:
    assert f"\n## {__version__}\n" in (ROOT / "NEWS.md").read_text()
