"""The processes of the daemon: the supervisor, its workers, and the handover between them."""
