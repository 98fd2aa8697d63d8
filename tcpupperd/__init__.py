"""tcpupperd: a TCP service that answers every line upper-cased."""

__version__ = "0.1.0"

#: What other programs may use; see README.md, "Use it in your tests".
__all__ = ["ChunkHandler", "Config", "UpperHandler", "UpperServer", "__version__"]

_HOMES = {
    "ChunkHandler": "tcpupperd.serving.handlers",
    "Config": "tcpupperd.config",
    "UpperHandler": "tcpupperd.serving.handlers",
    "UpperServer": "tcpupperd.serving.server",
}


def __getattr__(name: str) -> object:
    """Import what is asked for (PEP 562): the client needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
