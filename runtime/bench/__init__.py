"""Benchmarks of a bundle, on this machine and on devices."""
