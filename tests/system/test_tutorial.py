"""The tutorial, word for word: the files that it shows, the commands, and what they print."""

from pathlib import Path

from documents import ROOT, check, script, steps
from system.container import booted
from system.roots import Root


def test_tutorial(release: str, tmp_path: Path) -> None:
    """On a machine with what the first command of the tutorial installs."""
    session = list(steps((ROOT / "docs/tutorial.md").read_text()))
    with booted(Root(release, "autopkgtest"), tmp_path) as machine:
        printed = machine.run("bash", "-m", stdin=script(session))
    print(printed)
    check(session, printed)
