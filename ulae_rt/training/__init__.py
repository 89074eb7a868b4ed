"""Training: configuration, pairs, the loop and its validation."""
