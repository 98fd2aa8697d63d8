"""tcpupperd: a TCP service that answers every line upper-cased."""

import sys

__version__ = "0.1.0"

# A checkout is run as it is, so nothing else has looked. Every module comes past here first, and
# an older Python must be able to read this file.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"tcpupperd needs Python 3.11 or later; this is Python {sys.version.split()[0]}")
