"""Debian root file systems to build in and to boot, made once and kept in the user's cache.

A root is never written to after it was made: containers put an overlay on it.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcpupperd"
RELEASES = ("bookworm", "trixie")
# What becomes the next one: the package is checked there, too.
TESTING = "forky"
#: To which release each is upgraded.
NEXT = {"bookworm": "trixie", "trixie": TESTING}

# What the package depends on. With these in its cache, apt installs it without a network.
DEPENDENCIES = ("procps", "python3", "python3-daemon", "python3-sdnotify")


@dataclass(frozen=True)
class Root:
    """A root file system: a Debian release and what it is for."""

    release: str
    purpose: str

    def path(self) -> Path:
        """The root's folder, made now if this recipe has not been followed before."""
        key = hashlib.sha256("\0".join(self.recipe(Path())).encode() + self.inputs()).hexdigest()
        folder = CACHE / f"{self.release}-{self.purpose}-{key[:12]}"
        with locked(CACHE / f"{self.release}-{self.purpose}.lock"):
            if not folder.exists():
                self.make(folder)
        return folder

    def make(self, folder: Path) -> None:
        """Make the root under another name first: a folder that exists is complete."""
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        print(f"making {folder.name} (about a minute)", file=sys.stderr, flush=True)
        subprocess.run(self.recipe(unfinished), check=True, cwd=TREE, stdin=subprocess.DEVNULL)
        unfinished.rename(folder)

    def inputs(self) -> bytes:
        """What the root depends on besides the recipe: the build dependencies."""
        if self.purpose not in ("build", "autopkgtest", "i386", *CROSS):
            return b""
        control = (TREE / "debian/control").read_text()
        return "".join(re.findall(r"^Build-Depends:(?:\n .*)+", control, re.MULTILINE)).encode()

    def recipe(self, folder: Path) -> list[str]:
        """The mmdebstrap(1) command that makes this root in `folder`."""
        return [
            *("mmdebstrap", "--quiet", "--variant=minbase", "--skip=cleanup/apt"),
            # What a mirror has of testing may be past its date.
            *(['--aptopt=Acquire::Check-Valid-Until "false"'] * (self.release == TESTING)),
            *PURPOSES[self.purpose],
            *(upgrade_to(NEXT[self.release], self.release) if self.purpose == "upgrade" else ()),
            '--customize-hook=echo 127.0.0.1 localhost >"$1"/etc/hosts',
            '--customize-hook=echo ::1 localhost >>"$1"/etc/hosts',
            # systemd makes a new identity at each boot of a root that has none.
            '--customize-hook=rm -f "$1"/etc/machine-id "$1"/var/lib/dbus/machine-id',
            *(self.release, str(folder)),
            # A mirror may lack the other parts of the archive for these.
            *([MIRROR.format(self.release)] if self.purpose in ARCHITECTURES else ()),
        ]


#: For which the package is cross-built.
CROSS = ("arm64", "armhf", "riscv64")
BOOTED = "systemd,systemd-sysv,dbus,libpam-systemd,iproute2,python3"
BUILD_DEPENDENCIES = [
    '--customize-hook=mkdir -p "$1"/source/debian',
    "--customize-hook=copy-in debian/control /source/debian",
    '--customize-hook=chroot "$1" apt-get build-dep --yes /source',
]
PURPOSES = {
    # A machine of a user who has just cloned the project.
    "minimal": ["--include=ca-certificates,git,python3"],
    # A machine with systemd; "apt install" finds what the package depends on in apt's cache.
    "booted": [
        f"--include={BOOTED}",
        '--customize-hook=chroot "$1" apt-get install --yes --download-only --install-recommends '
        + " ".join(DEPENDENCIES),
    ],
    # The same with load balancers, which are not started at boot.
    "balancers": [
        f"--include={BOOTED},haproxy,libnginx-mod-stream,nginx,{','.join(DEPENDENCIES)}",
        '--customize-hook=chroot "$1" systemctl mask haproxy.service nginx.service',
    ],
    # A machine with systemd and what the package depends on, which apt is about to upgrade to the
    # next release.
    "upgrade": [f"--include={BOOTED},{','.join(DEPENDENCIES)}"],
    # A machine with the package's build dependencies.
    "build": [
        "--include=build-essential,cpio,devscripts,faketime,lintian,python3-debian,rpm",
        *BUILD_DEPENDENCIES,
    ],
    # The same for another architecture that this processor has, too.
    "i386": ["--architectures=i386", "--include=build-essential", *BUILD_DEPENDENCIES],
    # Machines that cross-build the package.
    **{
        architecture: [
            f"--architectures=amd64,{architecture}",
            f"--include=build-essential,crossbuild-essential-{architecture}",
            *BUILD_DEPENDENCIES[:-1],
            f'--customize-hook=chroot "$1" apt-get build-dep --yes'
            f" --host-architecture={architecture} --build-profiles=cross,nocheck /source",
        ]
        for architecture in CROSS
    },
    # Only files, for qemu-user: a big-endian machine with what the unit tests need.
    "s390x": [
        *("--architectures=s390x", "--variant=extract"),
        "--include=python3,python3-hypothesis,python3-pytest,python3-sdnotify",
    ],
    # A machine with systemd on which Debian's tests of packages run, which may need those, too.
    "autopkgtest": [
        f"--include={BOOTED},build-essential,apparmor,autodep8,autopkgtest,bash-completion",
        "--include=dpkg-repack,pybuild-plugin-autopkgtest,zsh",
        *BUILD_DEPENDENCIES,
    ],
}


def upgrade_to(following: str, release: str) -> list[str]:
    """The options with which apt in a root upgrades it to the next release without a network."""
    return [
        # What a mirror has of testing may be past its date.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        f'--customize-hook=sed -i s/{release}/{following}/g "$1"/etc/apt/sources.list',
        '--customize-hook=chroot "$1" apt-get update',
        '--customize-hook=chroot "$1" apt-get full-upgrade --yes --download-only',
    ]


#: The purposes named after an architecture; each is used with SOAK=1 only.
ARCHITECTURES = ("i386", "s390x", *CROSS)
MIRROR = "deb http://deb.debian.org/debian {} main"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`: two test runs never make the same root twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    for release in RELEASES:
        for purpose in PURPOSES.keys() - {*ARCHITECTURES}:
            print(Root(release, purpose).path())
