"""The source package: made from the tarball, built twice with one result, clean for lintian."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from release import debian_form
from system.build import make_tarball, run_offline
from system.roots import RELEASES, TESTING, TREE
from system.test_package import LINTIAN, UNWANTED_CHECKS
from tcpupperd import __version__

BUILD_SOURCE = "cd /mnt/tcpupperd && dpkg-buildpackage --build=source --no-sign"
BUILD = "dpkg-source --extract /mnt/*.dsc tree && cd tree && dpkg-buildpackage -b --no-sign"
# Another path, time, time zone, language, umask, home and number of CPUs. Both run the unit tests,
# as every build of the package does, and what these leave must not be in it.
VARIED = (
    "umask 002; export DEB_BUILD_OPTIONS=parallel=7 HOME=/nonexistent/second"
    " LC_ALL=C.UTF-8 LANG=tr_TR.UTF-8 TZ=Pacific/Kiritimati;"
    " mkdir -p /mnt/a/path/that/is/longer; cd /mnt/a/path/that/is/longer;"
    f" ANOTHER_TIME sh -ec '{BUILD}'"
)
ANOTHER_TIME = "faketime --exclude-monotonic '+400 days'"
PLAIN = f"export LC_ALL=C TZ=UTC; mkdir /mnt/one; cd /mnt/one; {BUILD}"
CONTENTS = "dpkg-deb --contents /mnt/one/tcpupperd_*.deb | awk '{ print $6 }'"
SORT = (
    "cp --recursive --dereference /mnt/tcpupperd/debian /tmp && cd /tmp"
    " && wrap-and-sort --wrap-always --short-indent --trailing-comma"
    " && diff --recursive /mnt/tcpupperd/debian debian"
)

# What one source cannot do right for all releases. The policy followed is that of testing, and the
# tools of Debian 12 need the older forms of debian/control and debian/watch.
IMPOSSIBLE = {
    "bookworm": "newer-standards-version",
    "trixie": "newer-standards-version",
    TESTING: "older-debian-watch-file-standard,package-uses-old-debhelper-compat-version"
    ",redundant-priority-optional-field,redundant-rules-requires-root-no-field",
}

pytestmark = pytest.mark.parametrize("release", [*RELEASES, TESTING], indirect=True)


@pytest.fixture(scope="module")
def source(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source package of what is committed."""
    folder = tmp_path_factory.mktemp(f"source-{release}")
    clone = folder / "tcpupperd"
    subprocess.run(["git", "clone", "--quiet", TREE, clone], check=True)
    tarball = make_tarball(clone)
    tarball.rename(folder / f"tcpupperd_{debian_form(__version__)}.orig.tar.gz")
    for made in ("build", "dist"):
        shutil.rmtree(clone / made)
    run_offline(release, folder, BUILD_SOURCE)
    return folder


def test_builds_are_reproducible_and_clean(release: str, source: Path) -> None:
    run_offline(release, source, PLAIN)
    # The time is varied on later releases only: in faketime of Debian 12, time.sleep() fails.
    another_time = "" if release == "bookworm" else ANOTHER_TIME
    run_offline(release, source, VARIED.replace("ANOTHER_TIME", another_time))
    for name in ("tcpupperd", "python3-outlive"):
        plain, varied = (
            next(source.glob(f"{path}/{name}_*.deb")) for path in ("one", "a/path/*/*/*")
        )
        assert digest(plain) == digest(varied), f"diffoscope {plain} {varied} tells the difference"
    suppressed = f"{UNWANTED_CHECKS.get(release, '')} --suppress-tags={IMPOSSIBLE[release]}"
    assert run_offline(release, source, f"{LINTIAN} /mnt/one/*.changes{suppressed}").strip() == ""
    contents = run_offline(release, source, CONTENTS).split()
    assert [path for path in contents if re.search(r"/\.[^/]", path)] == []


def test_control_files_are_sorted(release: str, source: Path) -> None:
    """As the release's own tool would have them."""
    assert run_offline(release, source, SORT) == ""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
