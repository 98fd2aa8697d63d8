"""``tcpupper``, the client of a tcpupperd server. See tcpupper(1)."""
