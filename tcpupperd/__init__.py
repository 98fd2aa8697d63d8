"""tcpupperd: a TCP service that answers every line upper-cased."""

__version__ = "0.1.0"
