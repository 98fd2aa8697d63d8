"""The parts of Python's library that a long-running process may need late.

An upgrade may remove or replace the library underneath a running process. What the process has not
loaded by then can no longer be loaded, or no longer matches what is loaded.
"""

from __future__ import annotations

import sys
from traceback import format_exception


def load() -> None:
    """Load these parts. Call this before the first fork, so that it is done only once."""
    # For suggestions in error messages, and to look up the name of a host.
    import difflib  # noqa: F401
    import encodings.idna  # noqa: F401

    # For a traceback, each version of Python loads different parts when it needs them. This loads
    # those for a traceback that quotes its source and suggests a similar name.
    try:
        getattr(sys, "exc_inf")  # noqa: B009
    except AttributeError as error:
        format_exception(error)
