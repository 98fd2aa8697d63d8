"""Builds the C module, for which pyproject.toml has no place. Everything works without it.

Two fields of the metadata are here as well: the licence, which setuptools before and since 77
takes in different forms, and the README for the package index, which cannot show its pictures.
"""

import os
import re
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

#: Set when a package is built, because it would go unnoticed if the module were missing from it.
REQUIRED = bool(os.environ.get("TCPUPPERD_REQUIRE_C"))

#: The module is written for the stable ABI, which free-threaded Python lacks: it is skipped there.
STABLE_ABI = "t" not in sys.abiflags

MODERN = int(setuptools.__version__.partition(".")[0]) >= 77
LICENCE = {"license_expression" if MODERN else "license": "MIT"}

README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
PICTURE = re.compile(r"^!\[[^]]*\]\([^)]*\)\n\n", re.MULTILINE)
#: Also to other files of the repository.
RELATIVE_LINK = re.compile(r"\[([^]]*)\]\((?!https:|#)[^)]*\)")
PAGE = {
    "long_description": RELATIVE_LINK.sub(r"\1", PICTURE.sub("", README)),
    "long_description_content_type": "text/markdown",
}

#: Distributions default to -O2, with which older compilers do not vectorise. Debian's
#: DEB_BUILD_OPTIONS=noopt, among others, asks for -O0, which counts.
OPTIMISATION = [] if "-O0" in os.environ.get("CFLAGS", "").split() else ["-O3"]

FAST_PATH = Extension(
    "tcpupperd.serving._fast_path",
    ["tcpupperd/serving/_fast_path.c"],
    extra_compile_args=OPTIMISATION,
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
        **LICENCE,
        **PAGE,
        ext_modules=[FAST_PATH],
        cmdclass={"build_ext": BuildIfPossible},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
elif REQUIRED:
    sys.exit("tcpupperd: no C module for free-threaded Python, which has no stable ABI")
else:
    print("tcpupperd: no C module for free-threaded Python, which has no stable ABI")
    setup(**LICENCE, **PAGE)
