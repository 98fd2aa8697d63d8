"""The interface to the operating system: passed descriptors, sockets, notifications, logs."""
