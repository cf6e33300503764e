"""Training: the loop, the optimizer, checkpoints and trackers."""
