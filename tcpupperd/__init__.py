"""tcpupperd: a TCP service that answers every line in upper case."""

import sys

__version__ = "0.1.0"

# A checkout runs without an installer that would have checked this. Every import of a module runs
# this file first, and an older Python must be able to parse it.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"tcpupperd needs Python 3.11 or later; this is Python {sys.version.split()[0]}")

#: The public names; see README.md, "Use it in your tests".
__all__ = ["ChunkHandler", "Config", "UpperHandler", "UpperServer", "__version__"]

TYPE_CHECKING = False  # what typing has, which the client does not import
if TYPE_CHECKING:
    from tcpupperd.config import Config
    from tcpupperd.serving.handlers import ChunkHandler, UpperHandler
    from tcpupperd.serving.server import UpperServer

_HOMES = {
    "ChunkHandler": "tcpupperd.serving.handlers",
    "Config": "tcpupperd.config",
    "UpperHandler": "tcpupperd.serving.handlers",
    "UpperServer": "tcpupperd.serving.server",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562): the client needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
