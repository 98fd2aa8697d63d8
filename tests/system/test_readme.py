"""The README's commands, in a fresh clone on a Debian with nothing but Python and git.

Run, test and install are all that a newcomer needs; each is done as a newcomer does it.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from release import debian_form
from system.build import make_tarball, run_script
from system.roots import RELEASES, TESTING, TREE, Root
from tcpupperd import __version__

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
# What the package depends on, and what that does.
NEEDED = {
    *("libncurses6", "libproc2-0", "linux-sysctl-defaults", "procps", "psmisc"),
    *("python3-daemon", "python3-lockfile", "python3-pkg-resources", "python3-sdnotify"),
}
# A newcomer's apt has no lists of packages yet.
NO_LISTS = "rm -rf /var/lib/apt/lists/*"
GET_MAKE = "apt-get -qq update && apt-get -qq install --yes make python3-venv >/dev/null"
GET_SUDO = """
apt-get -qq update && apt-get -qq install --yes sudo >/dev/null
echo 'somebody ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/somebody
"""


def readme(heading: str) -> list[str]:
    """The blocks of shell commands below a heading of the README, without comments."""
    text = (TREE / "README.md").read_text()
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    return [re.sub(r" +#.*", "", block) for block in blocks]


[RUN] = readme("Run it")
INSTALL, INSTALL_ELSEWHERE = readme("Install it")
TEST = readme("Development")[0].splitlines()[0]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone of what is committed."""
    subprocess.run(["git", "clone", "--quiet", TREE, tmp_path / "clone"], check=True)
    return tmp_path / "clone"


def test_ci_runs_what_the_readme_says() -> None:
    script = (TREE / ".ci/run").read_text()
    for line in readme("Development")[0].splitlines():
        assert f"\n{line.removeprefix('sudo ')} " in script


def test_run_needs_nothing_but_python(release: str, clone: Path) -> None:
    script = f"{RUN.strip()} & python3 -c '{CLIENT}' && kill -TERM $! && wait $!"
    assert r"b'HELLO\n'" in newcomer(release, clone, script, "--private-network")


@pytest.mark.parametrize("release", [*RELEASES, TESTING], indirect=True)
def test_tests_need_nothing_but_python(release: str, clone: Path) -> None:
    """As root, in another user's checkout, only enough to see that it works: .ci/run does all of
    it. As an ordinary user all of it on one release, and on the others where they may differ."""
    some = "" if release == "trixie" else "tests/unit tests/integration/test_listening.py"
    script = f"""
        {NO_LISTS}
        {as_somebody("true")}
        {TEST} tests/unit/test_address.py
        [ -z "$(find . -user root)" ]
        rm -r .venv
        {as_somebody(f"{TEST} {some}")}
    """
    output = newcomer(release, clone, script, *registry_access())
    assert len(re.findall(r"^=+ \d+ passed", output, re.M)) == 2
    install = "sudo apt-get install .*iproute2"
    assert re.search(rf"^\d+ skipped; to run them too: {install}", output, re.M)
    assert ("sudo python3 tests tests/system" in output) == (not some)


@pytest.mark.parametrize("release", ["bookworm"], indirect=True)
def test_tests_name_missing_packages(release: str, clone: Path) -> None:
    one = f"{TEST} tests/unit/test_address.py"
    script = f"""
        {NO_LISTS}
        export PIP_NO_INDEX=1
        {as_somebody(one)} 2>told && exit 9
        cat told
        apt-get -qq update
        apt-get -qq install --yes $(sed -n 's/.*: sudo apt-get install//p' told) >/dev/null
        {as_somebody(one)}
    """
    output = newcomer(release, clone, script, *registry_access())
    assert "lock file" not in output
    assert "Running the tests with the modules of this Python." in output
    assert re.search(r"^=+ \d+ passed", output, re.M)


def test_install_builds_and_installs(release: str, clone: Path) -> None:
    """In another user's checkout, all that it leaves belongs to that user; and the command that it
    prints removes what only the build needed."""
    list_packages = "dpkg-query --show --showformat='${Package}\\n'"
    script = f"""
        {GET_SUDO}
        {list_packages} >/tmp/before
        {{ {as_somebody(INSTALL)}; }} >/tmp/told
        cat /tmp/told
        [ -z "$(find . -user root)" ]
        ls dist/*.deb
        {as_somebody("make clean")}
        {as_somebody("$(sed -n 's/^== To remove the build dependencies: //p' /tmp/told) --yes")}
        tcpupper --version
        dpkg --status tcpupperd
        echo added: $({list_packages} | comm -13 /tmp/before -)
    """
    output = newcomer(release, clone, script, *registry_access())
    assert "Status: install ok installed" in output
    version = re.escape(debian_form(__version__))
    for name in ("python3-outlive", "tcpupperd"):
        assert re.search(rf"^dist/{name}_{version}-1_\w+\.deb$", output, re.M)
    [added] = re.findall(r"^added: (.*)$", output, re.M)
    installed = {"make", "python3-outlive", "tcpupperd"}
    assert installed <= set(added.split()) <= installed | NEEDED
    told = output.index("== The build requires these packages.")
    assert told < output.index("The following NEW packages will be installed", told)


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_virtual_environment_takes_it(release: str, clone: Path) -> None:
    check = f"{INSTALL_ELSEWHERE}\n~/tcpupperd/bin/tcpupperd --check"
    script = f"{GET_MAKE}\n{as_somebody(check)}\nls /home/somebody/tcpupperd/share/man/man8"
    output = newcomer(release, clone, script, *registry_access())
    assert "tcpupperd.8" in output
    assert "tcpupperd: the configuration is valid" in output


def test_package_needs_the_repository(clone: Path) -> None:
    """The tarball is without debian/, and says so. As root in another user's checkout."""
    subprocess.run(["chown", "--recursive", "65534", clone], check=True)
    tarball = make_tarball(clone)
    assert tarball.name == f"tcpupperd-{__version__}.tar.gz"
    subprocess.run(["tar", "--extract", "--file", tarball], cwd=clone.parent, check=True)
    for target in ("deb", "install-deb"):
        done = subprocess.run(
            ["make", "--silent", target],
            cwd=clone.parent / f"tcpupperd-{__version__}",
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        [told, _] = done.stderr.splitlines()  # make adds a line
        assert told == "A Debian package can only be built from a clone of the Git repository."


def as_somebody(script: str) -> str:
    """The shell command that runs a script as an ordinary user, to whom the clone then belongs."""
    # The kernel counts descriptors in flight by user ID: see tests/in_flight.py.
    user = 10_000 + os.getpid() % 50_000
    add = f"useradd --create-home --uid={user} somebody"
    become = f"{{ id -u somebody >/dev/null 2>&1 || {add}; }}"
    return f"{become} && chown -R somebody: . && su somebody -c {shlex.quote('set -e;' + script)}"


def newcomer(release: str, clone: Path, script: str, *options: str) -> str:
    """Run a shell script in the clone, on a machine that was just set up; its output."""
    options = ("--pipe", "--chdir=/mnt", *options)
    root = Root(release, "minimal")
    told = run_script(root, clone, script, *options, timeout=COMMAND_TIMEOUT)
    print(told)
    return told


def registry_access() -> list[str]:
    """The options that give the container this host's way to apt's and pip's registries."""
    options = ["--resolv-conf=replace-host"]
    for name, value in os.environ.items():
        if name.startswith(("PIP_", "SSL_")) or name.lower().endswith("_proxy"):
            options.append(f"--setenv={name}={value}")
            if value.startswith("/") and Path(value).exists():
                options.append(f"--bind-ro={value}")
    return options
