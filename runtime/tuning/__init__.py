"""Tuning: what is tried, measured and kept."""
