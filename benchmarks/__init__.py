"""tcpupperd beside its peers: ``python3 -m benchmarks`` (``--short``: within two minutes)."""
