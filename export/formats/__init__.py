"""Artifacts that a recipe asks for, and how each is written."""
