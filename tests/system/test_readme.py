"""The README's commands, in a fresh clone on a Debian with nothing but Python.

Run, test and install are all that a newcomer needs; each is done as a newcomer does it.
"""

import os
import subprocess
from pathlib import Path

import pytest

from system.container import SHELL, nspawn
from system.roots import TREE, Root

COMMAND_TIMEOUT = 900

CLIENT = """
import socket, time
deadline = time.monotonic() + 30
while True:
    try:
        connection = socket.create_connection(("localhost", 9999), 30)
        break
    except ConnectionRefusedError:
        assert time.monotonic() < deadline
        time.sleep(0.05)
connection.sendall(b"hello\\n")
print(connection.recv(64))
"""
RUN = f"python3 -m tcpupperd & python3 -c '{CLIENT}' && kill -TERM $! && wait $!"
GET_MAKE = "apt-get -qq update && apt-get -qq install --yes git make >/dev/null"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone of what is committed."""
    subprocess.run(["git", "clone", "--quiet", TREE, tmp_path / "clone"], check=True)
    return tmp_path / "clone"


def test_run_needs_nothing_but_python(release: str, clone: Path) -> None:
    assert r"b'HELLO\n'" in newcomer(release, clone, RUN, "--private-network")


# On Debian 12, .ci/run itself is this try.
@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_make_test_does_all_the_set_up(release: str, clone: Path) -> None:
    output = newcomer(release, clone, f"{GET_MAKE}\nmake test", *registry_access())
    assert " passed" in output
    assert "make system-test" in output


def test_make_install_builds_and_installs(release: str, clone: Path) -> None:
    script = f"{GET_MAKE}\nmake install\ntcpupperd --version\ndpkg --status tcpupperd"
    output = newcomer(release, clone, script, *registry_access())
    assert "Status: install ok installed" in output
    assert list((clone / "dist").glob("tcpupperd_*_all.deb"))


def newcomer(release: str, clone: Path, script: str, *options: str) -> str:
    """Run a shell script in the clone, on a machine that was just set up; its output."""
    options = ("--pipe", "--chdir=/mnt", *options)
    result = subprocess.run(
        nspawn(Root(release, "minimal"), clone, *options, *SHELL, script),
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_TIMEOUT,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout
    return result.stdout


def registry_access() -> list[str]:
    """The options that give the container this host's way to apt's and pip's registries."""
    options = ["--resolv-conf=replace-host"]
    for name, value in os.environ.items():
        if name.startswith(("PIP_", "SSL_")) or name.lower().endswith("_proxy"):
            options.append(f"--setenv={name}={value}")
            if value.startswith("/") and Path(value).exists():
                options.append(f"--bind-ro={value}")
    return options
