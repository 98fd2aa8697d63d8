"""The server of one process: protocols, connections, one epoll."""
