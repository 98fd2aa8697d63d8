"""Records docs/session.svg, the terminal session in the README. Run it as root for each release.

Everything in the picture was typed in a Debian system that was booted for it, with the package of
this tree installed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/session.svg"
RELEASE = "trixie"

COMMANDS = (
    "tcpupper hello",
    "tcpupper --ping -c 10 -i 0.25 &",
    "sudo systemctl restart tcpupperd",
    "journalctl --unit=tcpupperd --output=cat | grep -E '^(handed|took) over'",
    "systemd-analyze security tcpupperd | tail -n 1",
)

FONT_SIZE, LINE, MARGIN = 13, 18, 14
COLUMN = 0.602 * FONT_SIZE  # the width of a character in common fixed-width fonts
COLUMNS = 96

STYLE = f"""
text {{ font: {FONT_SIZE}px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
       fill: #c9d1d9; white-space: pre }}
.typed {{ fill: #ffffff; font-weight: 600 }}
.prompt {{ fill: #3fb950 }}
"""


@contextmanager
def installed() -> Iterator[Any]:
    """A booted machine with the package of this tree."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from system.build import build_package
    from system.conftest import install
    from system.container import booted
    from system.roots import Root

    with TemporaryDirectory() as folder:
        package = build_package(RELEASE, Path(folder))
        with booted(Root(RELEASE, "booted"), package.parent) as machine:
            install(machine, package)
            yield machine


def record() -> list[tuple[str, str]]:
    """Run the commands; return each with its output."""
    with installed() as machine:
        from documents import Step, results, script

        session = [
            Step('sudo() { "$@"; }', None),
            *(Step(typed(command), None) for command in COMMANDS),
        ]
        printed = machine.run("bash", stdin=script(session))
    return list(zip(COMMANDS, (output for output, _ in results(printed)[1:]), strict=True))


def typed(command: str) -> str:
    """A command typed at a human pace; the user waits until background commands have ended, and
    until workers have logged what they took over, a second later."""
    return f"{command} sleep 1" if command.endswith("&") else f"{command}; wait; sleep 2"


def draw(session: list[tuple[str, str]]) -> str:
    """The session as SVG; long lines are folded as a terminal does. Runs of blanks are kept by
    xml:space in renderers that do not know white-space in style sheets."""
    rows = []
    for command, output in session:
        rows.append(
            f'<tspan class="prompt">$ </tspan><tspan class="typed">{escape(command)}</tspan>'
        )
        rows += [escape(part) for line in output.splitlines() for part in folded(line)]
    height = 2 * MARGIN + LINE * len(rows)
    width = round(2 * MARGIN + COLUMN * COLUMNS)
    texts = (
        f'<text x="{MARGIN}" y="{MARGIN + LINE * number + FONT_SIZE}">{row}</text>\n'
        for number, row in enumerate(rows)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" xml:space="preserve">\n'
        f"<title>Nothing is lost during a restart</title>\n<style>{STYLE}</style>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#161b22"/>\n'
        f"{''.join(texts)}</svg>\n"
    )


def folded(line: str) -> list[str]:
    """Split a line into parts that fit."""
    return [line[start : start + COLUMNS] for start in range(0, max(1, len(line)), COLUMNS)]


if __name__ == "__main__":
    PICTURE.write_text(draw(record()))
