"""Named recipes: what ``--recipe NAME`` stands for. docs/explanation/quality.md has what each
loses on a real language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from mobilevlm.export.recipes.layer_formats import (
    DOWN,
    HALF_DOWN,
    SHARED_KV,
    TOWER_DOWN,
    TOWER_QKV,
)
from mobilevlm.recipe import Limits, LinearFormat, Precision, Recipe


def _uniform(
    name: str,
    vision: Precision,
    decoder: Precision,
    embeddings: Literal["fp32", "fp16"],
    limits: Limits,
) -> Recipe:
    tower, layers = LinearFormat(vision), LinearFormat(decoder)
    return Recipe(name, tower, tower, layers, layers, embeddings, limits)


def _limits(vision: float, kl: float, perplexity: float, accuracy: float) -> Limits:
    """Return limits with a margin to what was measured on a real decoder of 135 million weights,
    which are harder to round than those of larger ones (docs/explanation/quality.md)."""
    return Limits(vision, kl, perplexity_ratio=perplexity, accuracy_loss=accuracy)


_FINE = LinearFormat("q8", block_size=64)
"""Layers whose rounding costs most: the head, which in 4 bits makes half of what such a decoder
loses; the output of an MLP, whose inputs have the largest outliers; keys and values that several
query heads share, which are few."""


_TOWER = LinearFormat("int8", "gptq", "smoothquant")
"""Format of towers, trained ones of which have channels 50 to 100 times larger than others."""
_PROJECTOR = LinearFormat("fp16")
"""Reads the tower's outliers, which no norm before it can take, and is small."""
_TOWER_LAYERS = {
    # Sharp attention turns the rounding of queries and keys into other answers.
    TOWER_QKV: LinearFormat("fp16"),
    # The widest inputs: second moments of theirs would take most of an export's time.
    TOWER_DOWN: replace(_TOWER, quantizer="mse"),
}


def _int8() -> Recipe:
    base = _uniform("int8", "int8", "int8", "fp16", _limits(0.08, 0.02, 1.05, 0.005))
    return replace(
        base,
        tower=_TOWER,
        projector=_PROJECTOR,
        decoder=LinearFormat("int8", "mse", "rotation"),
        lm_head=_FINE,
        layers={DOWN: _FINE, SHARED_KV: _FINE, **_TOWER_LAYERS},
    )


def _int4() -> Recipe:
    """Return what keeps most in the size of llama.cpp's Q4_K_M (benchmarks/RESULTS.md)."""
    decoder = LinearFormat("q4", "gptq", "rotation", block_size=32, symmetric=False)
    fine = replace(_FINE, quantizer="gptq")
    return replace(
        _uniform("int4", "int8", "q4", "fp16", _limits(0.08, 0.1, 1.2, 0.01)),
        tower=_TOWER,
        projector=_PROJECTOR,
        decoder=decoder,
        lm_head=_FINE,
        layers={HALF_DOWN: fine, SHARED_KV: fine, **_TOWER_LAYERS},
    )


def _portable() -> Recipe:
    """Return int8 without blocks: their kernel gives other sums in other runtimes, and wants
    weights of its own form, which are not mapped."""
    layers = LinearFormat("int8", "gptq")
    return replace(
        _int8(),
        name="int8-portable",
        decoder=replace(layers, scaling="rotation"),
        lm_head=layers,
        layers={DOWN: replace(layers, scaling="smoothquant"), **_TOWER_LAYERS},
    )


_INT8, _INT4, _PORTABLE = _int8(), _int4(), _portable()
_SMALL = replace(_INT4.decoder, block_size=64)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        _uniform("fp32", "fp32", "fp32", "fp32", _limits(1e-4, 1e-6, 1.001, 0.001)),
        _uniform("fp16-weights", "fp16", "fp16", "fp16", _limits(5e-3, 1e-4, 1.01, 0.002)),
        _INT8,
        replace(
            _INT8,
            name="int8-calibrated",
            decoder=replace(_INT8.decoder, quantizer="gptq"),
            layers={**_INT8.layers, TOWER_DOWN: _TOWER},
        ),
        _PORTABLE,
        _INT4,
        replace(
            _INT4,
            name="fast",
            prefill=_PORTABLE.lm_head,
            prefill_layers={
                DOWN: _PORTABLE.layers[DOWN],
                HALF_DOWN: LinearFormat("fp16"),
                SHARED_KV: LinearFormat("fp16"),
            },
            limits=replace(_INT4.limits, prefill_kl=_INT8.limits.decoder_kl),
        ),
        replace(
            _INT4,
            name="int4-small",
            decoder=_SMALL,
            lm_head=replace(_SMALL, scaling="none"),
            limits=replace(_INT4.limits, decoder_kl=0.3, perplexity_ratio=1.5),
            layers=_TOWER_LAYERS,
        ),
        _uniform("a16w8", "qdq16", "qdq16", "fp16", _limits(0.15, 0.2, 1.1, 0.015)),
        _uniform("a8w8", "qdq8", "qdq8", "fp16", _limits(0.5, 1.5, 2.0, 0.2)),
    )
}
