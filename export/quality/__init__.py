"""Losses: measured, attributed to layers, and held against limits."""
