"""The commands in the documentation, on a machine with the package installed."""

from pathlib import Path

from documents import ON_INSTALLED, README_ON_INSTALLED, ROOT, Step, check, script, section, steps
from system.conftest import install
from system.container import booted
from system.roots import Root

#: A root shell needs no sudo; and the machine is in a checkout, of which the package was built.
PLACE = [Step('cd /mnt/tcpupperd; sudo() { "$@"; }', "")]


def test_documents(release: str, package: Path) -> None:
    with booted(Root(release, "booted"), package.parent) as machine:
        install(machine, package)
        for text in texts():
            session = [*PLACE, *steps(text)]
            check(session, machine.run("bash", stdin=script(session)))


def texts() -> list[str]:
    readme = (ROOT / "README.md").read_text()
    parts = [section(readme, heading) for heading in README_ON_INSTALLED]
    return parts + [(ROOT / name).read_text() for name in ON_INSTALLED]
