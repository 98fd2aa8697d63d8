"""Builds the load generator and the C and Go peers, and installs packages for the Python peers.

Everything goes below ``build/benchmarks/``. Peers that cannot be built are named and left out.
"""

import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
TREE = HERE.parent
BUILD = TREE / "build" / "benchmarks"
PEERS = HERE / "peers"

# The daemon runs on Debian's own Python, so its Python peers do too.
PYTHON = Path("/usr/bin/python3")
VENV_PYTHON = BUILD / "venv" / "bin" / "python"
PACKAGES = ("gevent", "twisted", "uvloop")


def build_all() -> None:
    """Raise ``CalledProcessError`` if the C programs, which are required, cannot be built."""
    BUILD.mkdir(parents=True, exist_ok=True)
    _compile(HERE / "load.c", BUILD / "load")
    _compile(PEERS / "epoll.c", BUILD / "epoll")
    _compile_c_module()
    if shutil.which("go"):
        _run("go", "build", "-o", BUILD / "goroutines", PEERS / "goroutines.go")
    try:
        _install_packages()
    except subprocess.CalledProcessError as error:
        print(f"skipping the Python peers that need packages: {error}")


def _compile(source: Path, program: Path) -> None:
    _run("gcc", "-O3", "-Wall", "-Wextra", "-Werror", "-o", program, source)


def _compile_c_module() -> None:
    """In the tree, which the daemon is measured from. One binary serves Python 3.11 and later."""
    source = TREE / "tcpupperd/serving/_fast_path.c"
    include = sysconfig.get_path("include")
    target = source.with_suffix(".abi3.so")
    _run(
        "gcc", "-O3", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{include}", "-o", target, source
    )


def _install_packages() -> None:
    if not VENV_PYTHON.exists():
        _run(PYTHON, "-m", "venv", BUILD / "venv")
    if not versions():
        print("installing", *PACKAGES, flush=True)
        _run(VENV_PYTHON, "-m", "pip", "install", "--quiet", *PACKAGES)


def versions() -> list[str]:
    """Name and version of each package of the Python peers; empty while one is missing."""
    program = (
        "import sys; from importlib.metadata import version;"
        "print(*(f'{name} {version(name)}' for name in sys.argv[1:]), sep='\\n')"
    )
    if not VENV_PYTHON.exists():
        return []
    command = [str(VENV_PYTHON), "-c", program, *PACKAGES]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.splitlines() if result.returncode == 0 else []


def _run(*command: str | Path) -> None:
    subprocess.run([str(argument) for argument in command], check=True)
