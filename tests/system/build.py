"""The Debian package of the work tree as it is, built on the release it is for."""

import os
import shutil
import subprocess
from pathlib import Path

from system.container import SHELL, nspawn
from system.roots import TREE, Root

BUILD_TIMEOUT = 600
END_OF_0_1_0 = "--before=2026-11-23T00:00:00Z"
# The unit tests hand over a thousand connections; systemd-nspawn allows 1024 descriptors.
OPTIONS = ("--private-network", "--pipe", "--rlimit=NOFILE=20000")


def build_package(release: str, folder: Path, profile: str = "nocheck") -> Path:
    """Build in `folder`, without a network, and return the package's file; `both` returns that of
    the library, too.

    Files that git does not know are left out, as in a fresh clone. `profile` is a build profile:
    "nocheck" leaves out the unit tests, "" nothing.
    """
    copy_tree(folder)
    return _build(release, folder, profile)


def both(package: Path) -> list[Path]:
    """A package, and the library built along with it, on which it depends; packages from before
    there was one have none."""
    return [package, *package.parent.glob("python3-outlive_*.deb")]


def copy_tree(folder: Path) -> None:
    """Copy what git knows of into `folder`."""
    source = folder / "tcpupperd"
    source.mkdir()
    for name in git("ls-files", "-z").decode().rstrip("\0").split("\0"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TREE / name, source / name, follow_symlinks=False)


def build_previous_package(release: str, folder: Path) -> Path:
    """The same of the commit before the last; of the last, where git has no other."""
    commit = git("rev-list", "--first-parent", "--max-count=2", "HEAD").decode().split()[-1]
    return build_commit(release, folder, commit)


def build_0_1_0(release: str, folder: Path) -> Path:
    """The same of version 0.1.0, of which there is no tag: of the last commit on the day of its
    release."""
    commit = git("rev-list", "-1", END_OF_0_1_0, "HEAD").decode().strip()
    return build_commit(release, folder, commit)


def build_commit(release: str, folder: Path, commit: str) -> Path:
    """The same of a commit."""
    index = {"GIT_INDEX_FILE": str(folder / "index")}  # in the place of that of the work tree
    git("read-tree", commit, **index)
    git("checkout-index", "--all", f"--prefix={folder}/tcpupperd/", **index)
    # Its build dependencies may be others than those that are installed.
    return _build(release, folder, "nocheck", "--no-check-builddeps")


def make_tarball(clone: Path) -> Path:
    """The tarball of a clone, made with this checkout's virtual environment."""
    ready = TREE / ".venv/ready"
    environment = (f"VENV={ready.parent}", f"--old-file={ready}")
    subprocess.run(["make", "--silent", "dist", *environment], cwd=clone, check=True)
    [tarball] = (clone / "dist").glob("*.tar.gz")
    return tarball


def git(*words: str, **environment: str) -> bytes:
    return subprocess.check_output(["git", *words], cwd=TREE, env=os.environ | environment)


def _build(release: str, folder: Path, profile: str, *options: str) -> Path:
    environment = f"DEB_BUILD_PROFILES={profile} DEB_BUILD_OPTIONS={profile}"
    build = " ".join(("dpkg-buildpackage --build=binary --no-sign", *options))
    run_offline(release, folder, f"cd /mnt/tcpupperd && {environment} {build}")
    return next(folder.glob("tcpupperd_*.deb"))


def run_offline(release: str, folder: Path, script: str, purpose: str = "build") -> str:
    """Run a shell script with `folder` as /mnt in the release's build root; its output."""
    return run_script(Root(release, purpose), folder, script, *OPTIONS, timeout=BUILD_TIMEOUT)


def run_script(root: Root, folder: Path, script: str, *options: str, timeout: float) -> str:
    """Run a shell script with `folder` as /mnt in a root; its output."""
    result = subprocess.run(
        nspawn(root, folder, *options, *SHELL, script),
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout
