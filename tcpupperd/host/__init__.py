"""What the machine gives and wants: descriptors passed in, sockets, notifications, logs."""
