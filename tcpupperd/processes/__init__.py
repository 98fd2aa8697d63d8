"""How several processes are one service: supervisor, workers, hand-over."""
