"""The programs with which some tests inspect the daemon."""

import shutil

import pytest

#: Debian's packages of them.
PACKAGES = {
    "cc": "gcc libc6-dev",
    "chromium": "chromium",
    "clang": "clang",
    "gcc": "gcc libc6-dev",
    "git": "git",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "journalctl": "systemd",
    "make": "make",
    "mandoc": "mandoc",
    "nft": "nftables",
    "nginx": "nginx libnginx-mod-stream",
    "openssl": "openssl",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "ss": "iproute2",
    "strace": "strace",
    "stunnel4": "stunnel4",
    "systemd-analyze": "systemd",
    "systemd-socket-activate": "systemd",
    "unshare": "util-linux",
}


def need(tool: str) -> str:
    """The path of a program; where it is not installed, the test is skipped."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed (apt-get install {PACKAGES[tool]})")
    return path
