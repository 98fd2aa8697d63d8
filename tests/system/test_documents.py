"""What the documents tell a reader to type, where the package is installed."""

from pathlib import Path

from documents import ON_INSTALLED, ROOT, Step, check, script, steps
from system.conftest import install
from system.container import booted
from system.roots import Root

#: A root shell needs no sudo; and the machine is in a checkout, of which the package was built.
PLACE = [Step('cd /mnt/tcpupperd; sudo() { "$@"; }', "")]


def test_documents(release: str, package: Path) -> None:
    with booted(Root(release, "booted"), package.parent) as machine:
        install(machine, package)
        for name in ON_INSTALLED:
            session = [*PLACE, *steps((ROOT / name).read_text())]
            check(session, machine.run("bash", stdin=script(session)))
