"""How one process serves: protocols, connections, one epoll."""
