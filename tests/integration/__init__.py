"""Real daemons, sockets and signals, without root."""
