"""The interface to the machine: passed descriptors, sockets, notifications, logs."""
