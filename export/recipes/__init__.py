"""Recipes: the precision of each part, in code, in TOML and layer by layer."""
