"""Texts that users see: no false friends, and no synonyms for the terms of CONTRIBUTING.md."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from documents import ROOT, documents, name_of

#: What not to write (regular expressions; a space stands for any white space), and what to write.
LAPSES = {
    r"after all|all the same": "nevertheless",
    r"a work": "workload",
    r"also if": "even if",
    r"anew": "again",
    r"as (?:long|many|much) again": "twice the time or number",
    r"as ever": "as usual",
    r"at once": "immediately; at the same time",
    r"be rid of": "disable, remove",
    r"beside": "next to, while, in addition to",
    r"cut|cuts|cutting": "reset, close",
    r"ever more \w+ly": "increasingly",
    r"fill(?:s|ed)? the memory": "exhaust memory",
    r"from (?:\w+ )?[\d.]+ on": "with ... and later",
    r"further": "additional, another, more",
    r"givers?|takers?": "the worker that hands over, that takes over",
    r"go(?:es)? on|went on|going on": "continue",
    r"growing intervals": "increasing intervals",
    r"hand-overs?": "handover",
    r"has come|have come": "has arrived",
    r"headers? of the PROXY protocol": "PROXY header",
    r"in(?:to)? force": "current, running",
    r"in the long run": "on average",
    r"introduc(?:e|es|ed|ing)": "send a PROXY header, identify",
    r"is gone|are gone": "has exited, has disappeared",
    r"is over|are over": "has expired, has ended",
    r"it is time": "is due",
    r"keep-alive messages?": "keep-alive notification",
    r"kernel's queue": "accept queue",
    r"last configuration that worked": "last good configuration",
    r"many lines at once": "pipelined lines",
    r"now and then": "from time to time",
    r"our|of ours": "tcpupperd's, local",
    r"over (?:a|the|every) (?:reload|restart|upgrade)s?": "across restarts",
    r"relatives? of": "related to",
    r"seldom": "rarely",
    r"signs? of life": "heartbeat; keep-alive notification",
    r"so long|so many": "this long, this many",
    r"somebody|nobody|everybody|anybody|whoever": "anyone, nothing, no process",
    r"speaks? for": "the evidence for",
    r"the documents": "the documentation",
    r"unfinished|half a line": "incomplete",
    r"wrong (?:configuration|file|option|setting)s?|(?:file|configuration) is wrong": "invalid",
}

#: What is right although it contains a lapse.
EXCEPTIONS = ("cut off", "cut short", "cut it short")


def any_of(rules: Iterable[str]) -> str:
    """A regular expression; white space includes the marks of comments."""
    return "|".join(rf"\b(?:{rule})\b".replace(" ", r"[\s#]+") for rule in rules)


SEARCH = re.compile(f"(?P<fine>{any_of(EXCEPTIONS)})|{any_of(LAPSES)}", re.IGNORECASE)

#: Files that are read as they are, in addition to the documents in Markdown.
FILES = (
    ".github/**/*.yml",
    "Makefile",
    "contrib/*.json",
    "contrib/*.yml",
    "data/catalog/*",
    "data/firewalld/*",
    "data/man/*",
    "data/tcpupperd.toml",
    "data/ufw/*",
    "debian/README.Debian",
    "debian/control",
    "examples/*.*",
    "examples/[!_]*/*",
    "install.mk",
    "packaging/*/*",
    "systemd/*",
    "systemd/examples/*",
    "tcpupperd/serving/status.html.in",
)
MODULES = sorted(
    path for name in ("outlive", "tcpupperd") for path in ROOT.glob(f"{name}/**/*.py")
)
TEXTS = sorted(
    {*documents(), *(path for files in FILES for path in ROOT.glob(files) if path.is_file())}
)


def lapses(text: str, first_line: int = 1) -> list[str]:
    """Each lapse with its line and what to write instead."""
    found = (
        (text[: lapse.start()].count("\n"), lapse[0])
        for lapse in SEARCH.finditer(text)
        if not lapse["fine"]
    )
    return [f"line {first_line + line}: {lapse!r}: {better(lapse)}" for line, lapse in found]


def better(lapse: str) -> str:
    return next(
        word for rule, word in LAPSES.items() if re.fullmatch(any_of([rule]), lapse, re.IGNORECASE)
    )


def prose(path: Path) -> str:
    """A text without code spans, and without the list of lapses in CONTRIBUTING.md."""
    text = path.read_text()
    if path.suffix == ".md":
        text = re.sub("`[^`\\n]+`", lambda code: " " * len(code[0]), text)
    return text.partition("\n## Words\n")[0] if path.name == "CONTRIBUTING.md" else text


def strings(module: ast.Module) -> Iterator[ast.Constant]:
    """The strings in a module that may be messages: no docstrings, no single words."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Expr)
    for node in ast.walk(module):
        if not isinstance(node, documented):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.Constant) and " " in str(child.value):
                    yield child


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_texts(path: Path) -> None:
    assert not lapses(prose(path))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_messages(path: Path) -> None:
    found = [
        lapse
        for string in strings(ast.parse(path.read_text()))
        for lapse in lapses(str(string.value), string.lineno)
    ]
    assert not found


@pytest.mark.parametrize(
    "text", ["It stops At\n# once.", "Further instances", "cut off, or cut", "for so many seconds"]
)
def test_lapse_is_found(text: str) -> None:
    assert len(lapses(text)) == 1


def test_string_may_be_a_message_unless_it_is_a_docstring_or_a_word() -> None:
    code = 'def f(x):\n    """Not it."""\n    log.info("a %s", f"b {x}")\n    return "c"\n'
    assert sorted(str(string.value) for string in strings(ast.parse(code))) == ["a %s", "b "]
