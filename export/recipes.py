"""Recipes: which precision each part of a model is exported in, and how far it may drift.

A recipe is named (``int4``) or read from a TOML file with the same fields as the dataclass.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mobilevlm.errors import MobileVLMError
from mobilevlm.spec import GGUFType, from_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "q8", "q4"]
"""How the weights of a linear layer are stored and multiplied.

``fp32``, ``fp16``: float; ``int8``: 8-bit weights, activations quantized while running;
``q8``, ``q4``: 8- or 4-bit weights in blocks, float activations (MatMulNBits).
"""

_GGUF_TYPES: dict[Precision, GGUFType] = {
    "fp32": "f32",
    "fp16": "f16",
    "int8": "q8_0",
    "q8": "q8_0",
    "q4": "q4_0",
}


@dataclass(frozen=True)
class Limits:
    """What an artifact may lose against the float32 reference before the export fails."""

    vision_relative_error: float
    """Of the visual tokens, as a ratio of Euclidean norms."""
    decoder_kl: float
    """Mean Kullback–Leibler divergence of the next-token distributions, in nats."""


@dataclass(frozen=True)
class Recipe:
    """Precisions of one export."""

    name: str
    vision: Precision
    """Linear layers of the tower and the projector; convolutions and norms stay float."""
    decoder: Precision
    lm_head: Precision
    embeddings: Literal["fp32", "fp16"]
    limits: Limits
    block_size: int = 32
    """Weights that share a scale in ``q4`` and ``q8``."""
    gguf: GGUFType | None = None
    """Type of the GGUF decoder; by default what is nearest to ``decoder``."""
    gguf_mmproj: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Type of the GGUF tower and projector; by default ``f32`` for ``fp32``, else ``f16``."""
    gguf_imatrix: str | None = None
    """Importance matrix for rounding the GGUF decoder: a file of llama.cpp's format."""
    gguf_calibration: str | None = None
    """Data to collect one from: ``scenes``, or a JSONL file (export/calibration.py)."""

    def for_manifest(self) -> dict[str, Any]:
        """All fields; of files only their names, since folders say nothing elsewhere."""
        fields = asdict(self)
        for name in ("gguf_imatrix", "gguf_calibration"):
            fields[name] = fields[name] and Path(fields[name]).name
        return fields

    @property
    def gguf_type(self) -> GGUFType:
        return self.gguf or _GGUF_TYPES[self.decoder]

    @property
    def mmproj_type(self) -> GGUFType:
        return self.gguf_mmproj or ("f32" if self.vision == "fp32" else "f16")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "fp32", "fp32", "fp32", "fp32", Limits(1e-4, 1e-6)),
        Recipe("fp16-weights", "fp16", "fp16", "fp16", "fp16", Limits(5e-3, 1e-4)),
        Recipe("int8", "int8", "int8", "int8", "fp16", Limits(0.15, 0.1)),
        Recipe("int4", "int8", "q4", "q4", "fp16", Limits(0.15, 0.5)),
    )
}


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a ``.toml`` file.

    Raises:
        MobileVLMError: no such recipe, or the file's fields are wrong.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise MobileVLMError(
            f"recipe {name!r} is not known: expected {', '.join(RECIPES)}, or a .toml file"
        )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MobileVLMError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MobileVLMError(f"{path}: not a TOML recipe: {error}") from None
    recipe = from_dict(Recipe, {"name": path.stem, **data}, str(path), strict=True)
    if recipe.block_size not in (16, 32, 64, 128, 256):
        raise MobileVLMError(
            f"{path}.block_size: {recipe.block_size}, expected 16, 32, 64, 128 or 256"
        )
    # What it names lies beside it.
    if recipe.gguf_imatrix is not None:
        recipe = replace(recipe, gguf_imatrix=str(path.parent / recipe.gguf_imatrix))
    if recipe.gguf_calibration not in (None, "scenes"):
        recipe = replace(recipe, gguf_calibration=str(path.parent / str(recipe.gguf_calibration)))
    return recipe
