"""Creates the virtual environment of the tests: python3 tests/environment.py.

It needs Python and a package index, and installs nothing on the system. Debian's Python cannot
create a virtual environment with pip unless python3-venv is installed; without it, pip is taken
from the package on which python3-venv depends, which apt-get downloads for any user.
"""

import os
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

TREE = Path(__file__).resolve().parents[1]
VENV = TREE / ".venv"
PYTHON = VENV / "bin/python"
READY = VENV / "ready"
#: Changes to these files require a new installation: the dependencies and the C module.
SOURCES = [
    TREE / name for name in ("pyproject.toml", "setup.py", "tcpupperd/serving/_fast_path.c")
]
#: The modules that the tests import besides Python's own; Debian's packages add "python3-".
MODULES = ("daemon", "hypothesis", "pytest", "sdnotify")

sys.path.insert(0, str(TREE))
import tcpupperd  # noqa: E402, F401  which says it if Python is too old


def python() -> str:
    """The Python to run the tests with: that of the virtual environment, created if necessary.

    If it cannot be created, but this Python has all modules, it is this one.
    """
    try:
        make_environment()
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"Cannot create a virtual environment: {error_text(error)}.")
        missing = [name for name in MODULES if not find_spec(name)]
        if missing:
            packages = " ".join(f"python3-{name}" for name in missing)
            say(f"Without one, the tests need Debian's packages: sudo apt-get install {packages}")
            sys.exit(1)
        say("Running the tests with the modules of this Python.")
        return sys.executable
    return str(PYTHON)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def error_text(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return str(error)
    program = " ".join(str(word) for word in error.cmd[:2])
    return f"{program} failed with status {error.returncode}; see above"


def make_environment() -> None:
    if READY.exists() and READY.stat().st_mtime >= max(one.stat().st_mtime for one in SOURCES):
        return
    say("creating .venv (takes about a minute)")
    with_pip = find_spec("ensurepip") is not None
    venv.create(VENV, clear=True, symlinks=True, with_pip=with_pip)
    if not with_pip:
        install_pip()
    # A path, in place of a finder that each Python would import: a third of the time it starts in.
    path_only = "--config-settings=editable_mode=compat"
    pip("install", "--use-pep517", path_only, "--editable", f"{TREE}[test]")
    READY.touch()


def pip(*words: str, path: str = "-mpip") -> None:
    subprocess.run([PYTHON, path, "--quiet", *words], check=True)


def install_pip() -> None:
    """Install pip into the virtual environment from Debian's package of its wheel.

    apt-get uses its own lists in this folder, because the system's belong to root and may be
    empty.
    """
    with TemporaryDirectory() as folder:
        settings = {
            "APT::Sandbox::User": "",
            "Dir::Cache": folder,
            "Dir::State": folder,
            "Dir::State::status": "/var/lib/dpkg/status",
        }
        options = [f"-o{name}={value}" for name, value in settings.items()]
        for words in (["update"], ["download", "python3-pip-whl"]):
            subprocess.run(["apt-get", "--quiet=2", *options, *words], cwd=folder, check=True)
        [package] = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
        [wheel] = Path(folder).glob("usr/share/python-wheels/pip-*.whl")
        pip("install", "--no-index", str(wheel), path=f"{wheel}/pip")


def give_back() -> None:
    """Give the owner of the checkout what root made in it, as with sudo."""
    owner = TREE.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        options = ("--recursive", "--no-dereference", "--from=0")
        ids = f"{owner.st_uid}:{owner.st_gid}"
        subprocess.run(["chown", *options, ids, TREE], check=True)


if __name__ == "__main__":
    try:
        make_environment()
    finally:
        give_back()
