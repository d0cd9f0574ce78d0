"""How far the artifacts of a bundle are from the float32 reference (needs torch).

The reference is streamed layer by layer, so this needs no more memory than the export itself. The
pictures are made here from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mobilevlm.bundle import Bundle, StageQuality
from mobilevlm.errors import QualityError
from mobilevlm.export.recipes import Recipe
from mobilevlm.families import Model
from mobilevlm.image import open_image, preprocess
from mobilevlm.reference import load_reference
from mobilevlm.runtime.vlm import open_model

Float32 = NDArray[np.float32]

PROMPTS = (
    "Describe the picture.",
    "What colour is the largest shape?\nAnswer the question using a single word or phrase.",
)
GREEDY_TOKENS = 16

MTMD_ERROR = 2e-3
"""What llama.cpp's vision stage may be off at least: whatever the type, its activations are
tables in float16."""


def measure_format(model: Model, bundle: Bundle, form: str) -> dict[str, StageQuality]:
    """Runs a bundle's artifacts of one format, and the reference, on the same pictures and prompts.

    ``vision``: of the visual tokens, ``cosine`` (least over tokens) and ``relative_error``.
    ``decoder``, given the reference's visual tokens: ``kl`` (mean, in nats) and ``top1_agreement``
    over all positions. ``end_to_end``: ``greedy_match``, the share of greedy tokens up to the first
    one that the reference would not have chosen.
    """
    vision: list[dict[str, float]] = []
    decoder: list[dict[str, float]] = []
    matches: list[float] = []
    artifacts = tuple(part for part in bundle.manifest.artifacts if part.format == form)
    alone = replace(bundle, manifest=replace(bundle.manifest, artifacts=artifacts))
    with open_model(alone) as vlm, torch.no_grad():
        reference = load_reference(model, streamed=True)
        for seed, prompt in enumerate(PROMPTS):
            image = calibration_image(seed, model.spec.image.size)
            pixels = preprocess(open_image(image), model.spec.image)
            exact = reference.visual_tokens(pixels)
            vision.append(compare_vectors(vlm.encode_image(image), exact.numpy()))
            answer = vlm.generate(prompt, [image], max_new_tokens=GREEDY_TOKENS, ignore_eos=True)
            ids = [*vlm.prompt_ids(prompt, 1), *answer.token_ids]
            embeds = reference.embed(ids, [exact])
            logits = reference.logits(embeds).numpy()
            decoder.append(compare_logits(vlm.embeds_logits(embeds.numpy()), logits))
            matches.append(_greedy_match(answer.token_ids, logits))
    found = {
        "vision": _worst(vision),
        "decoder": _worst(decoder),
        "end_to_end": {"greedy_match": _rounded(min(matches))},
    }
    return {stage_name(stage, form): StageQuality(figures) for stage, figures in found.items()}


def stage_name(stage: str, form: str) -> str:
    """A stage as the manifest names it: ``vision`` for the ONNX artifact, ``vision_gguf`` …"""
    return stage if form == "onnx" else f"{stage}_{form}"


def check_limits(stages: dict[str, StageQuality], recipe: Recipe, form: str) -> None:
    """Fails when a figure is beyond what the recipe allows.

    Raises:
        QualityError: names stage, figure and limit.
    """
    vision = recipe.limits.vision_relative_error
    if form == "gguf":
        vision = max(vision, MTMD_ERROR)
    checks = (
        (stage_name("vision", form), "relative_error", vision),
        (stage_name("decoder", form), "kl", recipe.limits.decoder_kl),
    )
    for stage, figure, limit in checks:
        value = stages[stage].figures[figure]
        if not value <= limit:
            raise QualityError(
                f"quality of recipe {recipe.name!r}: {stage} {figure} is {value:.4g}, the limit is "
                f"{limit:.4g}: choose a finer recipe, or raise the limit in a recipe file"
            )


def calibration_image(seed: int, size: int) -> NDArray[np.uint8]:
    """A picture ``(size, size, 3)`` of smooth colours, edges and noise, fixed by the seed."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size)
    picture = np.zeros((size, size, 3), np.float32)
    for channel in range(3):
        a, b, phase = random.uniform(1, 8, 3)
        picture[..., channel] = 0.5 + 0.3 * np.sin(a * x + b * y + phase)
    for _ in range(6):
        left, top = random.uniform(0, 0.8, 2)
        width, height = random.uniform(0.05, 0.3, 2)
        inside = (x > left) & (x < left + width) & (y > top) & (y < top + height)
        picture[inside] = random.uniform(0, 1, 3)
    picture += random.normal(0, 0.02, picture.shape)
    return (picture.clip(0, 1) * 255).astype(np.uint8)


def compare_vectors(found: Float32, exact: Float32) -> dict[str, float]:
    """``cosine`` (least over rows) and ``relative_error`` (of the whole) of ``(rows, size)``."""
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(exact, axis=-1)
    cosine = (found * exact).sum(axis=-1) / np.maximum(norms, 1e-30)
    error = np.linalg.norm(found - exact) / max(float(np.linalg.norm(exact)), 1e-30)
    return {"cosine": float(cosine.min()), "relative_error": float(error)}


def compare_logits(found: Float32, exact: Float32) -> dict[str, float]:
    """``kl`` (exact from found, mean over positions) and ``top1_agreement`` of
    ``(positions, vocab_size)``."""
    p, q = _log_softmax(exact), _log_softmax(found)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    agreement = (found.argmax(axis=-1) == exact.argmax(axis=-1)).mean()
    return {"kl": float(kl.mean()), "top1_agreement": float(agreement)}


def _log_softmax(logits: Float32) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def _greedy_match(tokens: Sequence[int], logits: Float32) -> float:
    """``logits``: of the prompt and the tokens; token i was chosen at the position before it."""
    expected = logits[-len(tokens) - 1 : -1].argmax(axis=-1)
    wrong = np.flatnonzero(expected != np.asarray(tokens))
    return float(wrong[0] if len(wrong) else len(tokens)) / len(tokens)


def _worst(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """The worst sample of each figure: errors at their largest, agreement at its least."""
    return {
        name: _rounded((max if name in ("kl", "relative_error") else min)(s[name] for s in samples))
        for name in samples[0]
    }


def _rounded(value: float) -> float:
    """Four significant digits: beyond them lies the noise of summation order."""
    return float(f"{value:.4g}")
