"""Builds the C module, for which pyproject.toml has no place. Everything works without it."""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

#: Set when a package is built, because it would go unnoticed if the module were missing from it.
REQUIRED = bool(os.environ.get("TCPUPPERD_REQUIRE_C"))

#: The module is written for the stable ABI, which free-threaded Python lacks: it is skipped there.
STABLE_ABI = "t" not in sys.abiflags

FAST_PATH = Extension(
    "tcpupperd.serving._fast_path",
    ["tcpupperd/serving/_fast_path.c"],
    # Distributions default to -O2, with which older compilers do not vectorise.
    extra_compile_args=["-O3"],
    py_limited_api=True,
    optional=not REQUIRED,
)


class BuildIfPossible(build_ext):
    """Skips the module, with a one-line message, if it cannot be compiled."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        # The exception raised without a compiler depends on the version of setuptools; `optional`
        # does not cover all of them.
        except Exception as error:
            if REQUIRED:
                raise
            print(f"tcpupperd: installing without the C module: {error}")


if STABLE_ABI:
    setup(
        ext_modules=[FAST_PATH],
        cmdclass={"build_ext": BuildIfPossible},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
elif REQUIRED:
    sys.exit("tcpupperd: no C module for free-threaded Python, which has no stable ABI")
else:
    print("tcpupperd: no C module for free-threaded Python, which has no stable ABI")
    setup()
