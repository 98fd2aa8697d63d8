"""The C module, compiled as a test needs it."""

import subprocess
import sys
import sysconfig
from pathlib import Path

from integration.processes import cannot
from tools import need

SOURCE = Path(__file__).parents[1] / "tcpupperd/serving/_fast_path.c"
COMPILE = ("-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def compiled(target: Path, *options: str, compiler: str = "cc") -> str:
    """What the compiler says when it has made `target` of the C module, or else a skip."""
    include = sysconfig.get_path("include")
    if "t" in sys.abiflags:
        cannot("free-threaded Python has no stable ABI")
    if not Path(include, "Python.h").exists():
        cannot("Python's headers are not installed (apt-get install python3-dev)")
    command = (need(compiler), *COMPILE, *options, f"-I{include}", "-o", str(target), str(SOURCE))
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
