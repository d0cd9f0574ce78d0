"""Recipes as TOML text for people to review and edit; export/recipes/recipe.py reads them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilevlm.export.recipes.recipe import PARTS, PREFILL, LinearFormat, Recipe


def recipe_text(
    recipe: Recipe, folder: Path, header: Sequence[str] = (), comments: Mapping[str, str] = {}
) -> str:
    """A recipe that is to be a file in ``folder`` and named by that file. Files that it names are
    named from there. ``comments``: what stands behind an entry of ``layers``."""
    lines = [f"# {line}" if line else "" for line in header]
    lines += [f"{part} = {_format(getattr(recipe, part))}" for part in PARTS]
    if recipe.prefill is not None:
        lines.append(f"{PREFILL} = {_format(recipe.prefill)}")
    lines.append(f"embeddings = {json.dumps(recipe.embeddings)}")
    if recipe.experts != "fused":
        lines.append(f"experts = {_value(recipe.experts)}")
    for name in ("calibration", "gguf", "gguf_mmproj", "gguf_imatrix", "gguf_calibration"):
        value = getattr(recipe, name)
        if value is not None:
            is_path = name == "gguf_imatrix" or (name.endswith("calibration") and value != "scenes")
            text = os.path.relpath(value, folder) if is_path else value
            lines.append(f"{name} = {_value(text)}")
    lines += ["", "[limits]"]
    limits = _fields(recipe.limits)
    lines += [f"{name} = {_value(value)}" for name, value in limits if value is not None]
    if recipe.layers:
        lines += ["", "[layers]"]
    for name, layers in recipe.layers.items():
        comment = f"  # {comments[name]}" if name in comments else ""
        lines.append(f"{_value(name)} = {_format(layers)}{comment}")
    return "\n".join(lines) + "\n"


def _format(layers: LinearFormat) -> str:
    """A precision, or a table of it and what is not as usual."""
    usual = LinearFormat(layers.precision)
    entries = [
        f"{name} = {_value(value)}"
        for name, value in _fields(layers)
        if name == "precision" or value != getattr(usual, name)
    ]
    return _value(layers.precision) if len(entries) == 1 else f"{{ {', '.join(entries)} }}"


def _fields(data: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(data, field.name)) for field in dataclasses.fields(data)]


def _value(value: str | bool | float) -> str:
    """JSON's spelling of these is TOML's too."""
    return json.dumps(value, ensure_ascii=False)
