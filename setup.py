"""What pyproject.toml has no place for: the C module, without which everything works, too."""

import os
import sys

from setuptools import Extension, setup

#: Set where a package is built: without it, what cannot be compiled is left out.
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

if STABLE_ABI:
    setup(ext_modules=[TURN], options={"bdist_wheel": {"py_limited_api": "cp311"}})
elif REQUIRED:
    sys.exit("tcpupperd: no C module for free-threaded Python, which has no stable ABI")
else:
    print("tcpupperd: no C module for free-threaded Python, which has no stable ABI")
    setup()
