"""Keep the connections of a service open while it restarts."""
