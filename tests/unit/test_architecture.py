"""What ARCHITECTURE.md promises: who knows whom, and that a run loads only what it uses."""

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tcpupperd"
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()

#: Folders are layers, from the bottom up: a module imports from its own layer and those below. The
#: modules directly in the package are values, at the bottom, or commands, at the top. The client
#: also builds on the values, but no layer builds on it. Below all of them is `outlive`, a package
#: of its own.
LAYERS = ["outlive", "", "client", "host", "serving", "processes", "commands"]
COMMANDS = {"__main__", "cli"}

#: Large parts of the standard library that a run has no use for.
UNUSED = {
    "asyncio",
    "concurrent",
    "ctypes",
    "email",
    "html",
    "http",
    "inspect",
    "multiprocessing",
    "pathlib",
    "shutil",
    "sqlite3",
    "ssl",
    "subprocess",
    "tempfile",
    "unittest",
    "urllib",
    "xml",
}

#: The only parts that are not loaded by every run: those of `outlive` are for a service that has
#: only one process.
ONE_PROCESS = [
    "aio",
    "ending",
    "intake",
    "items",
    "leaving",
    "service",
    "signals",
    "store",
    "testing",
]
LEFT_OUT = {"__main__", "host.hardening", *(f"outlive.{name}" for name in ONE_PROCESS)}


def modules() -> list[str]:
    """All modules, by their names in tcpupperd, or by their full names in `outlive`. A folder's
    own is left out."""
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    paths += [path.relative_to(ROOT) for path in (ROOT / "outlive").rglob("*.py")]
    names = (path.with_suffix("") for path in paths if path.name != "__init__.py")
    return sorted(".".join(path.parts) for path in names)


def full_name(module: str) -> str:
    return module if module.startswith("outlive.") else f"tcpupperd.{module}"


def layer(module: str) -> int:
    folder = module.rpartition(".")[0]
    return LAYERS.index("commands" if module in COMMANDS else folder)


def is_client(module: str) -> bool:
    return module.startswith("client.")


def imports(module: str) -> Iterator[str]:
    """The modules that a module imports anywhere, TYPE_CHECKING included."""
    folder = ROOT if module.startswith("outlive.") else PACKAGE
    for node in ast.walk(ast.parse((folder / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Those of them that belong to the packages."""
    return {name.removeprefix("tcpupperd.") for name in imports(module)} & set(modules())


def test_imports_go_down_only() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in own_imports(module)
        if layer(name) > layer(module)
        or (name in COMMANDS and module != "__main__")
        or (is_client(name) and not is_client(module))
    ]
    assert not wrong


def test_outlive_needs_only_the_standard_library() -> None:
    for module in modules():
        if module.startswith("outlive."):
            names = {name.partition(".")[0] for name in imports(module)}
            assert names <= {"outlive", *sys.stdlib_module_names}, module


def test_host_does_not_know_the_service() -> None:
    host = {module for module in modules() if module.startswith("host.")}
    used = {name for one in host for name in own_imports(one) if not name.startswith("outlive.")}
    assert used - host <= {"address", "errors", "words"}


def test_there_is_no_circle() -> None:
    TopologicalSorter({module: own_imports(module) for module in modules()}).prepare()


def test_table_has_every_module_in_its_layer_and_no_other() -> None:
    assert sorted(listed()) == described()


def described() -> list[str]:
    return [module for module in modules() if not module.endswith("__main__")]


def listed() -> Iterator[str]:
    """The modules in the table of ARCHITECTURE.md, in which a layer's first row names it."""
    folder = ""
    for layer, _, cell in re.findall(
        r"^\| (.*?) ?\| (.+) \| (.+) \|$", ARCHITECTURE, re.MULTILINE
    ):
        if layer:
            folder = layer.strip("`").replace("/", ".") if "/" in layer else ""
        yield from (folder + name for name in re.findall(r"`([a-z_]+)`", cell))


def test_names_are_those_of_the_code() -> None:
    """For example, `Supervisor.TABLE`, `WORKER` and `systemd/tcpupperd.service`."""
    known: dict[str, object] = {}
    for module in described():  # the client first: the document is about the daemon
        found = import_module(full_name(module))
        known |= {**vars(found), module.rpartition(".")[2]: found}
    for owner, name in re.findall(r"`([A-Z]\w+|[a-z]\w+(?=\.))(?:\.(\w+))?`", ARCHITECTURE):
        assert owner in known
        assert not name or hasattr(known[owner], name), f"{owner}.{name}"
    for path in re.findall(r"`(\w+/[\w./]*)`", ARCHITECTURE):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path


#: Modules that are documented as sans I/O, or that could be.
WITHOUT_IO = [
    f"serving.{name}" for name in ("agent", "deadlines", "http", "lab", "protocol", "timers")
]

#: The parts of the standard library that these may use: none does I/O.
PURE = {
    "__future__",
    "collections",
    "enum",
    "heapq",
    "itertools",
    "json",
    "math",
    "random",
    "re",
    "typing",
}


@pytest.mark.parametrize("module", WITHOUT_IO)
def test_modules_without_io_import_none(module: str) -> None:
    assert own_imports(module) <= {"serving.protocol"}
    used = {name.partition(".")[0] for name in imports(module)} - {"tcpupperd"}
    assert used <= PURE


def test_a_run_loads_only_what_it_uses() -> None:
    loaded = loaded_by_a_run()
    packages = {"outlive", "tcpupperd"}
    own = {name for name in loaded if name.partition(".")[0] in packages and "._" not in name}
    used = {name for name in modules() if not is_client(name)} - LEFT_OUT
    folders = {f"tcpupperd.{folder}" for folder in ("host", "serving", "processes")}
    assert own == packages | folders | {full_name(module) for module in used}
    # Without the C module, keepers are started by ctypes.
    command = sys.executable, "-S", "-m", "tcpupperd", "--version"
    version = subprocess.check_output(command, cwd=ROOT, text=True)
    used_here = set() if ", using the C module" in version else {"ctypes"}
    assert not ({name.partition(".")[0] for name in loaded} & UNUSED) - used_here


def loaded_by_a_run() -> set[str]:
    """The modules that supervisor and worker load until they have stopped.

    Without `site`, which loads other installed packages, and what Python needs for logging: since
    3.14, that includes `inspect`.
    """
    started = names_in(run_python("-c", "import logging"))
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
