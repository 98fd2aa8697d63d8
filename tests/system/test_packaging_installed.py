"""What the package contains besides the service: completion, AppArmor profile, manual."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from documents import ROOT, links, name_of
from system.conftest import install
from system.container import Container, booted
from system.roots import RELEASES, TESTING, Root

# Keys, as readline(3) has them by default: Tab, Meta-*, Control-A, Control-E.
COMPLETE, INSERT_ALL, LINE_START, LINE_END = "\t", "\x1b*", "\x01", "\x05"


class Shell(NamedTuple):
    """How to start an interactive shell, and what to type for it to complete."""

    command: str
    start: str


BASH = Shell("bash --norc -i", "source /usr/share/bash-completion/bash_completion")
ZSH = Shell("zsh -f -i", "PS1=; unsetopt prompt_cr; bindkey -e; autoload compinit; compinit -u")

#: What else decides on the options that a command has.
USES: dict[str, tuple[tuple[str, ...], ...]] = {
    "tcpupperd": ((),),
    "tcpupper": ((), ("--ping",), ("--check",), ("--lab",)),
}

DOCUMENTS = "/usr/share/doc/tcpupperd"
LIBRARY = "/usr/share/doc/python3-outlive"

pytestmark = pytest.mark.parametrize("release", [*RELEASES, TESTING], indirect=True)


@pytest.fixture(scope="module")
def machine(release: str, package: Path) -> Iterator[Container]:
    """A machine with shells that complete, and the package installed."""
    with booted(Root(release, "autopkgtest"), package.parent) as machine:
        install(machine, package)
        yield machine


@pytest.mark.parametrize("command", USES)
def test_bash_completes_every_option(machine: Container, command: str) -> None:
    offered = completed(machine, f"{command} --", INSERT_ALL, shell=BASH)
    told = [machine.try_run(command, *use, "--help").stdout for use in USES[command]]
    assert set(offered.split()[1:]) == set(re.findall(r"--[a-z][a-z-]+", "".join(told)))


@pytest.mark.parametrize(
    ("typed", "rest"),
    [
        ("tcpupperd --framing n", "one"),
        ("tcpupperd --framing=l", "ine"),
        ("tcpupperd --listen loc", "alhost:9999"),
        ("tcpupperd --listen localhost:", "9999"),
        ("tcpupperd --max-line ", "65536"),
        ("tcpupperd --config /etc/tcpupperd/t", "cpupperd.toml"),
        ("tcpupperd --daemonize --user daem", "on"),
        ("tcpupper --timeo", "ut"),
        ("tcpupper --port ", "9999"),
    ],
)
def test_bash_completes_values(machine: Container, typed: str, rest: str) -> None:
    assert completed(machine, typed, COMPLETE, shell=BASH) == typed + rest


@pytest.mark.parametrize(
    ("typed", "rest"),
    [
        ("tcpupperd --framing n", "one"),
        ("tcpupperd --listen=loc", "alhost:9999"),
        ("tcpupper --timeo", "ut"),
        ("tcpupper --port ", "9999"),
    ],
)
def test_zsh_completes_values(machine: Container, typed: str, rest: str) -> None:
    assert completed(machine, typed, COMPLETE, shell=ZSH) == typed + rest


def test_apparmor_profile_is_right(machine: Container) -> None:
    machine.run("apparmor_parser", "-QT", "/etc/apparmor.d/tcpupperd")
    assert machine.run("systemctl", "cat", "tcpupperd.service").count("AppArmorProfile=") == 1


def test_links_of_the_documents_lead_somewhere(machine: Container) -> None:
    names = ["README.md", "SECURITY.md", *(name_of(path) for path in ROOT.glob("docs/*.md"))]
    documents = [f"{DOCUMENTS}/{name}" for name in names]
    for document in (*documents, f"{LIBRARY}/README.md", f"{LIBRARY}/docs/handover.md"):
        text = machine.run("cat", document)
        found = [link.partition("#")[0] for link in links(text) if "://" not in link]
        folder = document.rpartition("/")[0]
        machine.run("ls", *(f"{folder}/{path}" for path in found if path))


def test_changelogs_are_there(machine: Container) -> None:
    """Debian Policy, 12.7. The news are what upstream has in the place of a changelog."""
    assert machine.run("zcat", f"{DOCUMENTS}/changelog.Debian.gz").startswith("tcpupperd (")
    assert machine.run("zcat", f"{DOCUMENTS}/NEWS.Debian.gz").startswith("tcpupperd (")


def test_news_are_installed_once(machine: Container) -> None:
    """Under the name by which the README refers to them."""
    assert machine.run("head", "-n1", f"{DOCUMENTS}/NEWS.md") == "# News"
    changelogs = machine.run("find", DOCUMENTS, "-name", "changelog*")
    assert changelogs == f"{DOCUMENTS}/changelog.Debian.gz"


def test_modules_are_private(machine: Container) -> None:
    """As docs/decisions.md says."""
    assert machine.try_run("python3", "-c", "import tcpupperd").returncode == 1


def test_outlive_is_for_every_program(machine: Container) -> None:
    said = machine.run(
        "python3", "-Ic", "import outlive; print(outlive.__file__, outlive.Service)"
    )
    assert said.startswith("/usr/lib/python3/dist-packages/outlive/__init__.py <class ")
    assert machine.try_run("ls", "/usr/lib/tcpupperd/outlive").returncode


def test_modules_are_compiled(machine: Container) -> None:
    """Otherwise each start would compile them, and what root ran would outlive the package."""
    folders = ("/usr/lib/tcpupperd", "/usr/lib/python3/dist-packages/outlive")
    found = machine.run("find", *folders, "-name", "*.pyc")
    assert "/processes/__pycache__/supervisor." in found
    assert "/outlive/__pycache__/service." in found


def test_daemonize_says_what_it_needs(machine: Container) -> None:
    """python3-daemon is recommended, and the service works without it."""
    machine.run("apt-get", "purge", "--yes", "python3-daemon")
    assert machine.run("tcpupper", "hello") == "HELLO"
    told = machine.try_run("tcpupperd", "--daemonize", "--listen=localhost:7777").stdout
    assert told.endswith(
        " --daemonize: python-daemon is not installed (Debian package python3-daemon)\n"
    )


def completed(machine: Container, typed: str, key: str, *, shell: Shell) -> str:
    """What stands in the command line of an interactive shell after `key` was pressed."""
    show = f"{LINE_START}echo '<{LINE_END}>'"
    terminal = ("script", "-qec", f"env TERM=dumb {shell.command}", "/dev/null")
    keys = f"{shell.start}\n{typed}{key}{show}\nexit\n"
    output = machine.run(*terminal, stdin=keys)
    found = re.findall(r"^<(.*)>\r?$", output, re.MULTILINE)
    assert found, output
    return str(found[-1]).rstrip()
