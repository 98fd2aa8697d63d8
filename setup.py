"""What pyproject.toml has no place for: the C module. Everything works without it, too."""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

#: Set where a package is built, in which nobody would notice that the module is missing.
REQUIRED = bool(os.environ.get("TCPUPPERD_REQUIRE_C"))

#: Free-threaded Python has no stable ABI, for which the module is written: it is left out there.
STABLE_ABI = "t" not in sys.abiflags

TURN = Extension(
    "tcpupperd.serving._turn",
    ["tcpupperd/serving/_turn.c"],
    # By default distributions ask for -O2, with which older compilers make no vector code.
    extra_compile_args=["-O3"],
    py_limited_api=True,
    optional=not REQUIRED,
)


class BuildIfPossible(build_ext):
    """Leaves the module out if it cannot be compiled, and says so in one line."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        # What is raised if there is no compiler depends on the version of setuptools; `optional`
        # alone does not cover all of it.
        except Exception as error:
            if REQUIRED:
                raise
            print(f"tcpupperd: installing without the C module: {error}")


if STABLE_ABI:
    setup(
        ext_modules=[TURN],
        cmdclass={"build_ext": BuildIfPossible},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
elif REQUIRED:
    sys.exit("tcpupperd: no C module for free-threaded Python, which has no stable ABI")
else:
    print("tcpupperd: no C module for free-threaded Python, which has no stable ABI")
    setup()
