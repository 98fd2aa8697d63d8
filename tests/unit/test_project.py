"""Facts stated in several files agree."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tcpupperd import __version__
from tools import need

ROOT = Path(__file__).parents[2]

# The package's own test runs without the tree in its path, where release.py is.
sys.path.append(str(ROOT))
import release  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = PROJECT["dependencies"]
ADDRESS = PROJECT["urls"]["Homepage"]
#: Other organisations whose addresses may appear in the documentation.
OTHERS = {"salsa.debian.org", "toml.io", "www.debian.org"}


#: The folders of a build of the packages.
BUILT = {"tcpupperd", "python3-outlive", "__pycache__"}


def documents() -> Iterator[Path]:
    """The files that describe the project. A tarball of the source has no debian/."""
    yield from (ROOT / "LICENSE", ROOT / "pyproject.toml", *ROOT.glob("*.md"))
    for folder in ("data", "debian", "docs", "packaging", "systemd"):
        for path in (ROOT / folder).rglob("*"):
            made = BUILT & {*path.relative_to(ROOT / folder).parts[:-1]}
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


def test_placeholders_are_to_be_replaced() -> None:
    """As long as the project has no home, nobody is sent to an address that does not exist."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    security = (ROOT / "SECURITY.md").read_text()
    host = str(urlsplit(ADDRESS).hostname)
    assert host.endswith(".example.org") == ("\n## Placeholders\n" in contributing)
    assert host.endswith(".example.org") == (f"`git grep {host}`" in contributing)
    assert host not in security or not host.endswith(".example.org")


def test_debian_says_where_the_project_lives() -> None:
    assert f"\nHomepage: {ADDRESS}\n" in in_debian("control")
    assert f"\nSource: {ADDRESS}\n" in in_debian("copyright")


def test_debian_says_the_licence_of_the_project() -> None:
    ours = " ".join((ROOT / "LICENSE").read_text().partition("Permission")[2].split())
    theirs = in_debian("copyright").partition("Permission")[2]
    assert " ".join(theirs.replace("\n .\n", "\n").split()) == ours


def test_debian_needs_what_python_needs() -> None:
    """Stated by hand, without an upper bound: a release upgrade of Debian keeps the package."""
    package = in_debian("control").partition("\nPackage: tcpupperd\n")[2].partition("\n\n")[0]
    relations = re.findall(r"^ (python3\S* \(.*\)),$", package, re.MULTILINE)
    needed = [f"python3 ({PROJECT['requires-python'][:2]} {PROJECT['requires-python'][2:]})"]
    for name, version in re.findall(r"(?:python-)?([\w-]+)>=([\d.]+)", str(DEPENDENCIES)):
        needed.append(f"python3-{name} (>= {version})")
    needed.append("python3-outlive (= ${source:Version})")
    assert sorted(relations) == sorted(needed)


def test_every_place_has_the_version() -> None:
    in_debian("changelog")
    check_versions(ROOT)


def test_no_release_is_called_like_another_one() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "NEWS.md").read_text(), re.MULTILINE)
    assert len(headings) == len(set(headings)) > 1


def test_examples_name_no_version() -> None:
    """They would name one that does not exist, or an old one."""
    for path in (ROOT / "examples").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert not re.search(r"tcpupperd[:_-]\d+\.\d+\.\d+", path.read_text()), path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A Git repository with the files that have the version."""
    in_debian("changelog")
    git = need("git")
    others = (name for name, _, _ in release.OTHERS)
    for name in ("release.py", release.SOURCE, "NEWS.md", *release.ENTRIES, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for words in (
        ("init", "--quiet"),
        ("config", "user.name", "A maintainer"),
        ("config", "user.email", "maintainer@example.org"),
        ("add", "--all"),
        ("commit", "--quiet", "--message=first"),
    ):
        subprocess.run([git, *words], cwd=tmp_path, check=True)
    return tmp_path


def test_release_changes_every_place_and_development_goes_on(clone: Path) -> None:
    if not __version__.endswith(release.UNDER_DEVELOPMENT):
        release.develop(clone, "99.0.0", datetime.now(UTC))
        subprocess.run(
            ["git", "commit", "--quiet", "--all", "--message=next"], cwd=clone, check=True
        )
    version = release.version_of(clone).removesuffix(release.UNDER_DEVELOPMENT)
    subprocess.run([sys.executable, "release.py", "99.1.0"], cwd=clone, check=True)
    assert release.version_of(clone) == "99.1.0.dev0"
    check_versions(clone)
    subprocess.run(["git", "checkout", "--quiet", f"v{version}"], cwd=clone, check=True)
    assert release.version_of(clone) == version
    check_versions(clone)


@pytest.mark.parametrize("following", ["", "1.0", "1.0.0.dev0"])
def test_release_needs_a_version_to_go_on_with(clone: Path, following: str) -> None:
    done = subprocess.run(
        [sys.executable, "release.py", following], cwd=clone, check=False, capture_output=True
    )
    assert b"such as 1.2.3" in done.stderr
    check_versions(clone)


def test_release_needs_a_clean_clone(clone: Path) -> None:
    (clone / "new").touch()
    done = subprocess.run(
        [sys.executable, "release.py", "99.0.0"], cwd=clone, check=False, capture_output=True
    )
    assert b"uncommitted changes" in done.stderr
    check_versions(clone)


def check_versions(root: Path) -> None:
    """All places of a tree have the same version: a release's, with a date, or, in Debian's form
    and Python's, that of the development before it."""
    version = release.version_of(root)
    base = version.removesuffix(release.UNDER_DEVELOPMENT)
    assert re.fullmatch(r"\d+\.\d+\.\d+", base)
    in_news, *earlier = re.findall(r"^## (.*)$", (root / "NEWS.md").read_text(), re.MULTILINE)
    entries = re.findall(
        r"^tcpupperd \((\S+)-1\) (\w+);.*?^ -- [^\n]*>  ([^\n]*)$",
        (root / "debian/changelog").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    for name, begin, form in release.OTHERS:
        assert f"\n{begin}{form(version)}\n" in (root / name).read_text()
    day = parsedate_to_datetime(entries[0][2])
    released = version == base
    assert in_news == (f"{version} ({day:%Y-%m-%d})" if released else f"{base} (unreleased)")
    if released:
        heads = {(root / page).read_text().partition("\n")[0] for page in release.PAGES}
        assert heads == {f".Dd {day:%B} {day.day}, {day.year}"}
    assert entries[0][0] == release.debian_form(version)
    assert [entry[1] for entry in entries] == [
        "unstable" if released else "UNRELEASED",
        *["unstable"] * len(earlier),
    ]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", one) for one in earlier)
    told = re.findall(r"^tcpupperd \((\S+)-1\)", (root / "debian/NEWS").read_text(), re.MULTILINE)
    assert set(told) <= {entry[0] for entry in entries}
