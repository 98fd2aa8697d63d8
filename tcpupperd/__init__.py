"""tcpupperd: a TCP service that sends every line back in upper case."""

import sys

__version__ = "0.3.0.dev0"

# A checkout has no installer to check this. Every import runs this file first, so older versions
# of Python must be able to parse it.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"tcpupperd needs Python 3.11 or later; this is Python {sys.version.split()[0]}")

#: The public names; see README.md, "Use it in your tests".
__all__ = ["ChunkHandler", "Config", "UpperHandler", "UpperServer", "__version__"]

TYPE_CHECKING = False  # instead of typing.TYPE_CHECKING: the client does not import typing
if TYPE_CHECKING:
    from tcpupperd.config import Config
    from tcpupperd.serving.handlers import ChunkHandler, UpperHandler
    from tcpupperd.serving.server import UpperServer

_MODULES = {
    "ChunkHandler": "tcpupperd.serving.handlers",
    "Config": "tcpupperd.config",
    "UpperHandler": "tcpupperd.serving.handlers",
    "UpperServer": "tcpupperd.serving.server",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562): the client needs none of them."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
