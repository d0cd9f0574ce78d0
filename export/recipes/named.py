"""Named recipes: what ``--recipe NAME`` stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

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
    """The first two are wide enough for random weights, which quantize worse than any trained
    model (with experts in 4 bits a KL of 0.52): they find a broken artifact. The others are for
    answers that mean something: int8 may cost half a point of accuracy and int4 one, and nano loses
    less than a tenth of the perplexity that is allowed here (docs/quality.md)."""
    return Limits(vision, kl, perplexity_ratio=perplexity, accuracy_loss=accuracy)


def _int4() -> Recipe:
    """Blocks of 128, since a token's time is that of reading weights: with blocks of 32 and
    onnxruntime's scale and sum in float32 for each, it reads a third more. HQQ makes up for the
    larger blocks (benchmarks/RESULTS.md)."""
    layers = LinearFormat("q4", "hqq", block_size=128)
    base = _uniform("int4", "int8", "q4", "fp16", _limits(0.15, 0.6, 1.1, 0.01))
    return replace(base, decoder=layers, lm_head=layers)


_INT4 = _int4()
_INT8 = _uniform("int8", "int8", "int8", "fp16", _limits(0.15, 0.1, 1.05, 0.005))
_CALIBRATED = LinearFormat("int8", "gptq", "smoothquant")

RECIPES = {
    recipe.name: recipe
    for recipe in (
        _uniform("fp32", "fp32", "fp32", "fp32", _limits(1e-4, 1e-6, 1.001, 0.001)),
        _uniform("fp16-weights", "fp16", "fp16", "fp16", _limits(5e-3, 1e-4, 1.01, 0.002)),
        _INT8,
        replace(
            _INT8,
            name="int8-calibrated",
            tower=_CALIBRATED,
            projector=replace(_CALIBRATED, scaling="none"),
            decoder=_CALIBRATED,
            lm_head=_CALIBRATED,
            # Sharp attention turns the rounding of queries and keys into other answers.
            layers={"vision.layers.*.attn.q_proj": LinearFormat("fp16")},
        ),
        _INT4,
        replace(
            _INT4,
            name="fast",
            prefill=LinearFormat("int8"),
            limits=replace(_INT4.limits, prefill_kl=0.1),
        ),
        _uniform("a16w8", "qdq16", "qdq16", "fp16", _limits(0.15, 0.2, 1.1, 0.015)),
        _uniform("a8w8", "qdq8", "qdq8", "fp16", _limits(0.5, 1.5, 2.0, 0.2)),
    )
}
