"""The processes of the service: supervisor, workers, and the hand-over between them."""
