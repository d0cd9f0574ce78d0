"""Synthetic checkpoints: random weights in official layouts and published shapes."""
