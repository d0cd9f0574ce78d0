"""Graphs with fixed shapes for NPUs and phones."""
