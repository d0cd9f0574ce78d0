"""Quantizers: weights in, packed integers and scales out, one tensor at a time (numpy only)."""
