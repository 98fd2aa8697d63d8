"""Makes a release: python3 release.py NEXT (or make release NEXT=...), in a clean clone.

Commits the version under development as the release and tags it, then begins the development of
NEXT in another commit. Between releases, every tree has a version that ends in ".dev0" ("~dev" in
Debian's form) and sorts before the release: no two different trees have the version of a release.

The version comes from tcpupperd/__init__.py; tests/unit/test_project.py checks that all other
places agree with it.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCE = "tcpupperd/__init__.py"
#: The Debian files with entries as in deb-changelog(5). Not every release has one in debian/NEWS.
ENTRIES = ("debian/changelog", "debian/NEWS")
UNDER_DEVELOPMENT = ".dev0"


def version_of(root: Path) -> str:
    """Return the version of the tree below ``root``."""
    [version] = re.findall(r'^__version__ = "(.+)"$', (root / SOURCE).read_text(), re.MULTILINE)
    return str(version)


def debian_form(version: str) -> str:
    """Return the upstream version as Debian writes it, where only "~" sorts before the end."""
    return version.replace(UNDER_DEVELOPMENT, "~dev")


def quoted(version: str) -> str:
    """Return the version as a string in TOML."""
    return f'"{version}"'


#: The manual pages have the version and the date of the release in their footers.
PAGES = tuple(f"data/man/{name}" for name in ("tcpupper.1", "tcpupperd.8", "tcpupperd.toml.5"))

#: Other files with the version, besides Debian's: name, what comes before it, and its form.
OTHERS: tuple[tuple[str, str, Callable[[str], str]], ...] = (
    ("outlive/pyproject.toml", "version = ", quoted),
    ("packaging/arch/PKGBUILD", "_version=", str),
    ("packaging/rpm/tcpupperd.spec", "Version:        ", debian_form),
    *((page, ".Os tcpupperd ", str) for page in PAGES),
)


def release(root: Path, version: str, now: datetime) -> None:
    """Turn the version under development into ``version``, released at ``now``."""
    under_development = version + UNDER_DEVELOPMENT
    replace(root / SOURCE, f'"{under_development}"', f'"{version}"')
    set_others(root, under_development, version)
    for page in PAGES:
        replace(root / page, r"\.Dd .+", f".Dd {now:%B} {now.day}, {now.year}", is_pattern=True)
    replace(
        root / "NEWS.md", f"\n## {version} (unreleased)\n", f"\n## {version} ({now:%Y-%m-%d})\n"
    )
    for name in ENTRIES:
        begin = f"tcpupperd ({debian_form(under_development)}-1)"
        if (root / name).read_text().startswith(begin):
            head = rf"{re.escape(begin)} \w+;"
            replace(root / name, head, f"tcpupperd ({version}-1) unstable;", is_pattern=True)
            replace(root / name, r">  .+\n", f">  {format_datetime(now)}\n", is_pattern=True)


def develop(root: Path, version: str, now: datetime) -> None:
    """Begin the development of ``version``."""
    under_development = version + UNDER_DEVELOPMENT
    set_others(root, version_of(root), under_development)
    replace(root / SOURCE, f'"{version_of(root)}"', f'"{under_development}"')
    replace(root / "NEWS.md", "\n## ", f"\n## {version} (unreleased)\n\n## ")
    changelog = root / "debian/changelog"
    maintainer, *_ = re.findall(r"^ -- (.+>)  ", changelog.read_text(), re.MULTILINE)
    changelog.write_text(
        f"tcpupperd ({debian_form(under_development)}-1) UNRELEASED; urgency=medium\n\n"
        f"  * New upstream release.\n\n -- {maintainer}  {format_datetime(now)}\n\n"
        + changelog.read_text()
    )


def set_others(root: Path, old: str, new: str) -> None:
    """Replace the version in the other files."""
    for name, begin, form in OTHERS:
        replace(root / name, f"\n{begin}{form(old)}\n", f"\n{begin}{form(new)}\n")


def replace(path: Path, old: str, new: str, *, is_pattern: bool = False) -> None:
    """Replace the first occurrence of ``old`` in a file."""
    pattern = old if is_pattern else re.escape(old)
    text, count = re.subn(pattern, lambda _: new, path.read_text(), count=1)
    if not count:
        sys.exit(f"{path}: {old!r} not found")
    path.write_text(text)


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main(following: str) -> None:
    """Make both commits and the tag."""
    version = version_of(ROOT).removesuffix(UNDER_DEVELOPMENT)
    if not re.fullmatch(r"\d+\.\d+\.\d+", following) or following == version:
        sys.exit(f"{following!r}: must be the version after {version}, such as 1.2.3")
    if git("status", "--porcelain"):
        sys.exit("the clone has uncommitted changes: commit or remove them first")
    now = datetime.now(UTC)
    release(ROOT, version, now)
    git("commit", "--quiet", "--all", f"--message=release: {version}")
    git("tag", "--annotate", f"--message=tcpupperd {version}", f"v{version}")
    develop(ROOT, following, now)
    git("commit", "--quiet", "--all", f"--message=version: begin the development of {following}")
    print(f"Released {version} as v{version}. To publish it: git push --follow-tags")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python3 release.py NEXT, for example 1.2.3")
    main(sys.argv[1])
