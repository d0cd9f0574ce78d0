"""Engines on llama.cpp."""
