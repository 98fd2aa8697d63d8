"""Documents keep what they promise: links lead somewhere, and what they show is tried."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

import documents
from documents import (
    ON_INSTALLED,
    README_ELSEWHERE,
    README_ON_INSTALLED,
    ROOT,
    WITH_BALANCERS,
    Block,
    Step,
    blocks,
    name_of,
    versions,
)
from outlive import Order, Service, aio, items
from outlive.testing import Manager
from unit.test_lint import check, need_module
from waiting import DEADLINE

ALL = documents.documents()
LANGUAGES = {"", "console", "debcontrol", "diff", "ini", "make", "python", "sh", "text", "toml"}
#: Documents that have a test of their own.
ELSEWHERE = (WITH_BALANCERS, "docs/tutorial.md", "README.md")
TUTORIAL = (ROOT / "docs/tutorial.md").read_text()


@pytest.mark.parametrize("document", ALL, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for link in documents.links(document.read_text()):
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if "://" not in link:
            assert target.exists(), link
            assert not anchor or anchor in documents.anchors(target.read_text()), link


@pytest.mark.parametrize("document", ALL, ids=name_of)
def test_commands_are_those_that_a_test_runs(document: Path) -> None:
    """Commands stand in blocks that say so, and their document is one that a test runs."""
    languages = {block.language for block in blocks(document.read_text())}
    assert languages <= LANGUAGES
    if languages & {"console", "sh"}:
        assert name_of(document) in (*ON_INSTALLED, *ELSEWHERE)


def test_parts_of_the_readme_with_commands_are_those_that_a_test_runs() -> None:
    text = (ROOT / "README.md").read_text()
    parts = (documents.section(text, one) for one in (*README_ELSEWHERE, *README_ON_INSTALLED))
    assert sorted(commands(text)) == sorted(block for part in parts for block in commands(part))


def commands(text: str) -> list[Block]:
    return [block for block in blocks(text) if block.language in ("console", "sh")]


def test_session_is_what_a_reader_types() -> None:
    text = "```console\n$ true\n# echo a; echo b\na\n...\n$ cat x\n```\n\n```sh\nfalse\n```\n"
    session = list(documents.steps("```text x\nline\n```\n\n" + text))
    assert [step.output for step in session] == ["", "", "a\n...\n", "", None]
    assert session[1:3] == [Step("true", ""), Step("echo a; echo b", "a\n...\n")]
    assert session[4] == Step("set -e\nfalse\nset +e", None)


def test_background_commands_are_waited_for() -> None:
    session = list(documents.steps("```console\n$ sleep 1 &\n$ true\n```\n"))
    assert [step.command for step in session] == ["sleep 1 &", "true && wait"]


@pytest.mark.parametrize(
    ("shown", "command", "matches"),
    [
        ("a\nb\n", "echo a; echo b", True),
        ("a\n...\n", "echo a; echo b; echo c", True),
        ("a\n", "echo a; echo b", False),
        ("a\n", "echo a; false", False),
        ("", "sleep 0 &", True),
        (None, "echo whatever", True),
    ],
)
def test_output_is_compared(shown: str | None, command: str, matches: bool) -> None:
    session = [Step(command, shown), Step("echo last", "last\n")]
    text = documents.script(session)
    printed = subprocess.run(
        ["bash"], input=text, check=True, capture_output=True, text=True, timeout=DEADLINE
    ).stdout
    if matches:
        documents.check(session, printed)
    else:
        with pytest.raises(AssertionError):
            documents.check(session, printed)


# The tutorial


def test_reader_is_told_where_each_file_goes() -> None:
    for before, file in re.findall(r"([^\n]+(?:\n[^\n]+)*)\n\n```\S+ (\S+)\n", TUTORIAL):
        assert f"`{file}`" in before


def test_programs_are_clean(tmp_path: Path) -> None:
    need_module("mypy")
    need_module("ruff")
    programs: dict[str, str] = {}
    for files in versions(TUTORIAL):
        before, programs = programs, {name: files[name] for name in files if name.endswith(".py")}
        if programs == before:
            continue
        for name, text in programs.items():
            (tmp_path / name).write_text(text)
        config = f"--config={ROOT / 'pyproject.toml'}"
        check(sys.executable, "-m", "ruff", "check", config, "--config=src=['.']", tmp_path)
        check(sys.executable, "-m", "ruff", "format", config, "--diff", tmp_path)
        config = f"--config-file={ROOT / 'pyproject.toml'}"
        check(sys.executable, "-m", "mypy", config, *tmp_path.glob("*.py"))
    assert list(programs) == ["server.py", "counter.py", "asyncio_counter.py"]


def test_finished_files_are_those_of_the_last_step() -> None:
    finished = {block.file for block in blocks(documents.section(TUTORIAL, "The finished files"))}
    assert finished == {"counter.py", "debian/counter.service"}
    *_, before, last_but_one, last = versions(TUTORIAL)
    assert before == last_but_one == last


def test_a_diff_must_fit_exactly() -> None:
    text = "one\ntwo\nthree\nfour\n"
    diff = "@@ -1,2 +1,2 @@\n one\n-two\n+2\n@@ -4 +4,2 @@\n four\n+five\n"
    assert documents.changed(text, diff) == "one\n2\nthree\nfour\nfive\n"
    with pytest.raises(AssertionError):
        documents.changed("zero\n" + text, diff)


# The parts for other daemons


def test_parts_are_there_and_documented() -> None:
    table = (ROOT / "outlive/README.md").read_text().partition("| in `outlive`")[2]
    names = re.findall(r"`(\w+)\.(\w+)(?:\(([^)]*)\))?`", table.partition("\n\n")[0])
    assert len(names) > 10
    for module, name, parameters in names:
        part = getattr(importlib.import_module(f"outlive.{module}"), name)
        if callable(part):
            assert part.__doc__, name
        if parameters and not isinstance(part, type):
            told = [one.partition("=")[0].strip() for one in parameters.split(",")]
            code = part.__code__
            assert list(code.co_varnames[: len(told)]) == told, name


# The reference of the library


def reference(part: str) -> str:
    """What the first columns of its tables name."""
    text = (ROOT / "outlive/README.md").read_text().partition(f"\n### {part}")[2]
    rows = text.partition("\n### ")[0].splitlines()
    return "\n".join(row.split(" | ")[0] for row in rows if row.startswith("| `"))


def named(part: str) -> set[str]:
    return set(re.findall(r"`(?:\w+\.)?(\w+)", reference(part)))


def parameters(what: Callable[..., object]) -> list[str]:
    return [name for name in inspect.signature(what).parameters if name != "self"]


def public(kind: type) -> set[str]:
    """Its methods and the attributes that it sets."""
    set_here = re.findall(
        r"^ +self\.([a-z]\w*)(?:: .+)? = ", inspect.getsource(kind), re.MULTILINE
    )
    return {name for name in vars(kind) if not name.startswith("_")} | set(set_here)


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("Service(", public(Service) | set(parameters(Service))),
        ("Client, Item, Order", {"Client", "Item", *Order.__members__}),
        ("outlive.aio", set(aio.__all__)),
        ("outlive.testing", (public(Manager) | set(parameters(Manager))) - {"command"}),
    ],
)
def test_reference_has_all_names_and_no_other(part: str, names: set[str]) -> None:
    assert named(part) == names


def test_reference_has_all_parameters() -> None:
    tables = "".join(map(reference, ("Service(", "Client, Item, Order", "outlive.aio")))
    found = re.findall(r"`(\w+)\((.+?)\)`", tables)
    assert len(found) > 10
    for name, words in found:
        owners = [one for one in (Service, items, aio) if hasattr(one, name)]
        told = [word.partition("=")[0] for word in words.split(", ") if word != "*"]
        assert told == parameters(getattr(owners[0], name)), name


# The messages that an administrator looks for


def test_symptoms_quote_messages_of_the_daemon() -> None:
    operating = (ROOT / "docs/operating.md").read_text()
    text = documents.section(operating, "Troubleshooting by symptom")
    quoted = re.findall(r'"(.*?)"', re.sub(r"`.*?`", "", text))
    assert len(quoted) > 4
    said = list(strings_of_the_code())
    assert [quote for quote in quoted if not any(quote in one for one in said)] == []


def strings_of_the_code() -> Iterator[str]:
    for path in (ROOT / "tcpupperd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


# The recorded session


def load_session() -> ModuleType:
    spec = importlib.util.spec_from_file_location("session", ROOT / "docs/session.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_session_shows_its_commands() -> None:
    """Record it again after changing them."""
    session = load_session()
    picture = ElementTree.parse(session.PICTURE)
    assert picture.getroot().get("{http://www.w3.org/XML/1998/namespace}space") == "preserve"
    typed = [one.text for one in picture.iter() if one.get("class") == "typed"]
    assert typed == list(session.COMMANDS)


def test_session_is_drawn_as_a_terminal_shows_it() -> None:
    session = load_session()
    picture = ElementTree.fromstring(session.draw([("echo '<&>'", "<&>\n" + "x" * 100)]))
    assert picture.get("{http://www.w3.org/XML/1998/namespace}space") == "preserve"
    rows = ["".join(one.itertext()) for one in picture.iter() if one.tag.endswith("}text")]
    assert rows == ["$ echo '<&>'", "<&>", "x" * session.COLUMNS, "x" * (100 - session.COLUMNS)]
