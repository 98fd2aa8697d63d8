"""What ARCHITECTURE.md promises: who knows whom, and that a run loads only what it uses."""

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tcpupperd"

#: Each may import those before it, and the leaves.
CHAIN = ["protocol", "handler", "acceptor", "drain", "server", "worker", "supervisor", "cli"]

#: Whom of the package a leaf may import.
LEAVES: dict[str, set[str]] = {
    "__init__": set(),
    "background": set(),
    "client": set(),
    "config": {"listeners"},
    "deadlines": set(),
    "handover": {"notify"},
    "journal": set(),
    "listeners": set(),
    "notify": set(),
    "scoreboard": set(),
}

#: What a run without options loads of the standard library, less what the interpreter loads by
#: itself and modules that are private.
STANDARD = {
    "argparse",
    "array",
    "atexit",
    "collections",
    "collections.abc",
    "contextlib",
    "copyreg",
    "enum",
    "errno",
    "fcntl",
    "functools",
    "gc",
    "genericpath",
    "gettext",
    "grp",
    "heapq",
    "importlib",
    "importlib.machinery",
    "importlib.util",
    "itertools",
    "keyword",
    "linecache",
    "locale",
    "logging",
    "math",
    "mmap",
    "operator",
    "os",
    "posixpath",
    "pwd",
    "re",
    "reprlib",
    "resource",
    "runpy",
    "select",
    "selectors",
    "signal",
    "socket",
    "socketserver",
    "stat",
    "string",
    "struct",
    "textwrap",
    "threading",
    "token",
    "tokenize",
    "traceback",
    "types",
    "typing",
    "warnings",
    "weakref",
}

#: Of these, what newer versions of Python put off until it is needed.
PUT_OFF = {"linecache", "token", "tokenize"}

#: The only parts that are not loaded by every run.
LEFT_OUT = {"__init__", "__main__", "client"}


def modules() -> list[str]:
    return sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(module: str) -> Iterator[str]:
    """The modules that a module imports anywhere when it runs."""
    pending: list[ast.AST] = [ast.parse((PACKAGE / f"{module}.py").read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            yield str(node.module)
            if node.module == "tcpupperd":
                yield from (f"tcpupperd.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            pending.extend(ast.iter_child_nodes(node))


def own_imports(module: str) -> set[str]:
    """Those of them that belong to the package."""
    found = {name.removeprefix("tcpupperd.") for name in imports(module) if "tcpupperd." in name}
    return found & set(modules())


def test_every_module_has_its_place() -> None:
    assert modules() == sorted([*CHAIN, *LEAVES, "__main__"])
    assert own_imports("__main__") == {"cli"}


@pytest.mark.parametrize("module", CHAIN)
def test_chain_goes_in_one_direction(module: str) -> None:
    assert own_imports(module) <= {*CHAIN[: CHAIN.index(module)], *LEAVES} - {"client"}


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_know_nothing_of_the_chain(module: str) -> None:
    assert own_imports(module) == LEAVES[module]


@pytest.mark.parametrize("module", ["protocol", "deadlines"])
def test_what_does_no_io_can_do_none(module: str) -> None:
    assert set(imports(module)) <= {"__future__", "heapq", "math"}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the list is of Python 3.11")
def test_a_run_loads_only_what_it_uses() -> None:
    loaded = {name for name in loaded_by_a_run() if not name.startswith("_") and "._" not in name}
    own = {name for name in loaded if name.partition(".")[0] == "tcpupperd"}
    used = set(modules()) - LEFT_OUT
    assert own == {"tcpupperd", *(f"tcpupperd.{module}" for module in used)}
    assert loaded - own <= STANDARD
    assert STANDARD - loaded <= PUT_OFF


def loaded_by_a_run() -> set[str]:
    """The modules that supervisor and worker load until they have stopped.

    Without `site`, which loads whatever is installed beside us.
    """
    started = names_in(run_python("-c", "pass"))
    return names_in(run_python("-m", "tcpupperd", "--listen=127.0.0.1:0", "--workers=1")) - started


def run_python(*arguments: str) -> str:
    """What Python tells of its imports; a daemon is stopped when it is ready."""
    command = [sys.executable, "-S", "-X", "importtime", *arguments]
    # Another locale may take another codec.
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        told = []
        for line in process.stderr:
            told.append(line)
            if " ready: " in line:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, "".join(told)
    return "".join(told)


def names_in(told: str) -> set[str]:
    return set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", told, re.MULTILINE))
