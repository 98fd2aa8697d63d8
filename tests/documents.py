"""Reads the documentation: code blocks, commands with their output, links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

#: Between the outputs of two commands of a session.
MARK = "\x01"


class Block(NamedTuple):
    """A fenced block: its language, the file to which the reader is to write it, and the text."""

    language: str
    file: str
    text: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a document in Markdown."""
    found = re.findall(r"^```(\S*) ?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(*one) for one in found]


class Step(NamedTuple):
    """A command of a session, and what it prints; None where the document does not show it."""

    command: str
    output: str | None


def steps(document: str) -> Iterator[Step]:
    """The steps a reader takes: writing files, changing them, and running commands. Only commands
    have output."""
    for block in blocks(document):
        if block.file:
            yield Step(_patched(block) if block.language == "diff" else _written(block), "")
        elif block.language == "sh":
            yield Step(f"set -e\n{block.text}set +e", None)  # each of the commands must succeed
        elif block.language == "console":
            yield from _typed(block.text)


def _typed(text: str) -> Iterator[Step]:
    """The commands of a session. The output of background commands may come last."""
    parts = re.split(r"^[$#] ", text, flags=re.MULTILINE)[1:]
    commands = [part.partition("\n") for part in parts]
    background = any(command.endswith("&") for command, _, _ in commands)
    for number, (command, _, output) in enumerate(commands, 1):
        is_last = number == len(commands)
        yield Step(f"{command} && wait" if background and is_last else command, output)


def _written(block: Block) -> str:
    return (
        f"mkdir -p \"$(dirname {block.file})\" && cat >{block.file} <<'END OF FILE'\n"
        f"{block.text}END OF FILE"
    )


def _patched(block: Block) -> str:
    return f"patch --silent --fuzz=0 {block.file} <<'END OF FILE'\n{block.text}END OF FILE"


def versions(document: str) -> Iterator[dict[str, str]]:
    """The files that a reader has after each of the blocks that write or change one."""
    files: dict[str, str] = {}
    for block in blocks(document):
        if block.file:
            before = files.get(block.file, "")
            is_change = block.language == "diff"
            text = changed(before, block.text) if is_change else block.text
            files |= {block.file: text}
            yield dict(files)


def changed(text: str, diff: str) -> str:
    """A text after a change, which is a diff in the unified format without its header."""
    lines = text.splitlines()
    hunks = re.findall(r"^@@ -(\d+).* @@\n((?:[ +-].*\n|\n)+)", diff, re.MULTILINE)
    assert hunks, diff
    for start, hunk in reversed(hunks):  # from the end, so that the numbers of lines stay right
        rows = [row or " " for row in hunk.splitlines()]
        old = [row[1:] for row in rows if row[0] in " -"]
        begin = int(start) - 1
        assert lines[begin : begin + len(old)] == old, hunk
        lines[begin : begin + len(old)] = [row[1:] for row in rows if row[0] in " +"]
    return "".join(f"{line}\n" for line in lines)


def script(session: list[Step]) -> str:
    """A script for bash that runs the commands as if typed, and prints MARK after each."""
    lines = ["exec 2>&1"]
    for step in session:
        lines += [step.command, f"printf '{MARK}%d\\n' $?"]
    return "\n".join(lines) + "\n"


def results(printed: str) -> list[tuple[str, int]]:
    """The output and the exit status of each command in a script."""
    found = re.findall(rf"(.*?){MARK}(\d+)\n", printed + "\n", re.DOTALL)
    return [(output, int(status)) for output, status in found]


def check(session: list[Step], printed: str) -> None:
    """Compare the output of a script with the document, where "..." matches anything."""
    found = results(printed)
    assert len(found) == len(session), printed
    for step, (output, status) in zip(session, found, strict=True):
        assert status == 0, f"{step.command}: {status}\n{output}"
        if step.output is not None:
            pattern = re.escape(step.output).replace(r"\.\.\.", ".*")
            assert re.fullmatch(pattern, output, re.DOTALL), f"{step.command}:\n{output}"


#: The documents whose commands tests/system/test_documents.py runs, on a machine with the package
#: installed. The tutorial has a test of its own.
ON_INSTALLED = ("docs/handover.md", "docs/operating.md", "outlive/README.md")

#: The one that needs load balancers, which tests/system/test_lab.py runs.
WITH_BALANCERS = "docs/lab.md"

#: The parts of the README that it runs there; test_readme.py runs the others.
README_ON_INSTALLED = (
    "See it survive a restart",
    "See it survive kill -9",
    "See it in the journal",
)
README_ELSEWHERE = ("Run it", "Install it", "Development")


def section(text: str, heading: str) -> str:
    """The text below a heading."""
    [found] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def documents() -> list[Path]:
    """All documents in Markdown."""
    folders = ("", "benchmarks/**/", "contrib/**/", "docs/", "outlive/")
    return sorted(path for folder in folders for path in ROOT.glob(f"{folder}*.md"))


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def prose(text: str) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as generated by the forges."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(text), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def links(text: str) -> list[str]:
    """The targets of a document's links, including figures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))
