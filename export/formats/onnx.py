"""ONNX artifacts for processors: each stage of a model as a file, and what stands in the way."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mobilevlm.bundle import StageName
from mobilevlm.console.progress import Advance
from mobilevlm.errors import require
from mobilevlm.export.calibration.data import find_samples
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.calibration.stages import calibrate, calibration_key, check_torch
from mobilevlm.export.formats import (
    EMBEDDINGS,
    IMAGE,
    QDQ_TOOLS,
    Job,
    Written,
    image_settings,
    make_job,
    refuse,
)
from mobilevlm.export.recipes.layer_formats import bits_per_weight
from mobilevlm.linear_groups import linear_groups
from mobilevlm.model import Model
from mobilevlm.plain_types import to_dict
from mobilevlm.recipe import QDQ, Recipe
from mobilevlm.spec import ModelSpec

DECODER = ("decoder.layers.", "decoder.norm.", "decoder.lm_head.")
ENCODER = ("decoder.encoder.",)


@dataclass(frozen=True)
class _Stage:
    """One file to write."""

    name: StageName
    file: str
    precision: str
    prefixes: tuple[str, ...]
    recipe: Recipe
    settings: Sequence[Any]
    """Further inputs of its key, besides its layers' formats."""
    write: Callable[..., Written]


def onnx_jobs(model: Model, recipe: Recipe) -> list[Job]:
    """All stages of a model as ONNX files."""
    try:
        from mobilevlm.export.finish.kv_cache import check_cache
        from mobilevlm.export.fixed_shapes.vision import author_qdq, check_onnx
        from mobilevlm.export.graph import author
    except ImportError as error:
        raise require(error.name or "onnxscript", "export", "exporting") from None
    refuse(_refusals(model.spec, recipe))
    if recipe.vision_needs_reference:
        check_torch("a recipe that calibrates the vision tower")
    if recipe.kv_cache != "fp32":
        check_cache(model)
    in_fixed_point = recipe.tower.precision in QDQ
    if in_fixed_point:
        check_onnx()
    samples = find_samples(recipe.calibration, model) if recipe.is_calibrated else []
    spec, plain = to_dict(model.spec.decoder), replace(recipe, operators="runtime")
    cache = [] if recipe.kv_cache == "fp32" else _cache_settings(model, recipe, samples)
    stages = [
        _Stage(
            "vision", "vision_encoder", recipe.tower.precision, IMAGE, recipe,
            image_settings(model.spec),
            partial(author_qdq, samples) if in_fixed_point else author.author_vision,
        ),
        _Stage(
            "embeddings", "embed_tokens", recipe.embeddings, EMBEDDINGS, plain, [spec],
            author.author_embeddings,
        ),
    ]  # fmt: skip
    if model.spec.decoder.encoder_layers:
        precision, write = recipe.decoder.precision, author.author_encoder
        stages += [_Stage("encoder", "encoder_model", precision, ENCODER, plain, [spec], write)]
    stages += [
        _Stage(
            "decoder", "decoder_model_merged", recipe.decoder.precision, DECODER, plain,
            [spec, recipe.experts, *cache], author.author_decoder,
        ),
    ]  # fmt: skip
    if recipe.prefill is not None:
        stages += [
            _Stage(
                "prefill", "decoder_prefill", recipe.prefill.precision, DECODER,
                plain.for_prefill(), [spec, *cache], author.author_decoder,
            ),
        ]  # fmt: skip
    return [_job(model, samples, stage) for stage in stages]


def _cache_settings(model: Model, recipe: Recipe, samples: list[Sample]) -> list[Any]:
    """Return what the scales of keys and values depend on: samples run through all stages."""
    formats = [to_dict(recipe.format_of(group.name)) for group in linear_groups(model.spec)]
    measured = [formats, recipe.embeddings, recipe.experts, recipe.operators, recipe.layer_norm]
    return [recipe.kv_cache, measured, calibration_key(model, samples)]


def _refusals(spec: ModelSpec, recipe: Recipe) -> list[tuple[bool, str]]:
    """Return the conditions that rule these graphs out, each with its error line."""
    who, encoded = f"recipe {recipe.name!r}", spec.decoder.encoder_layers > 0
    vision = {recipe.tower.precision, recipe.projector.precision}
    decoder = recipe.decoder.needs_reference or recipe.lm_head.needs_reference
    return [
        (
            recipe.decoder.precision in QDQ,
            f"{who}: a decoder in fixed point is for NPUs: add --format npu",
        ),
        (
            recipe.elementary and vision != {"fp32"},
            f"{who}: elementary operators are for a vision stage in float: give tower and "
            f"projector fp32",
        ),
        (
            encoded and decoder,
            f"{who}: the decoder of {spec.name} has an encoder, which calibration does not run: "
            f"use rtn or hqq for it, without scaling",
        ),
        (
            encoded and recipe.prefill is not None,
            f"{who}: the decoder of {spec.name} has an encoder that reads prompts: choose a recipe "
            f"without 'prefill'",
        ),
    ]


def _job(model: Model, samples: list[Sample], stage: _Stage) -> Job:
    spec, recipe, precision = model.spec, stage.recipe, stage.precision
    # As the hub's ONNX community names files.
    path = f"onnx/{stage.file}{'' if precision == 'fp32' else f'_{precision}'}.onnx"
    groups = [group for group in linear_groups(spec) if f"{group.name}.".startswith(stage.prefixes)]
    formats = [recipe.format_of(group.name) for group in groups]
    settings = [*map(to_dict, formats), *stage.settings]
    if recipe.elementary:
        settings += [recipe.operators, recipe.layer_norm]
    referred = any(layers.needs_reference for layers in formats)
    if recipe.is_rotated and stage.prefixes == DECODER:
        settings.append("rotated")
    if referred:
        settings.append(calibration_key(model, samples))
        if stage.name == "vision":  # its layers are watched in the reference
            settings.append(importlib.metadata.version("torch"))
    if precision in QDQ:
        settings += [recipe.layer_norm, calibration_key(model, samples)]
        settings += map(importlib.metadata.version, QDQ_TOOLS)

    def author(file: Path, advance: Advance) -> Written:
        if not referred or stage.name == "encoder":
            return stage.write(model.weights, spec, recipe, file, advance)
        ready = calibrate(model, recipe, samples, "vision" if stage.name == "vision" else "decoder")
        return stage.write(ready.weights, spec, recipe, file, advance, ready.hessian)

    return make_job(
        model,
        "onnx",
        stage.name,
        precision,
        (path, f"{path}_data"),
        stage.prefixes,
        settings,
        author,
        bits_per_weight=round(bits_per_weight(recipe, groups), 4) if groups else None,
        weight_bits=max((layers.int8_weight_bits for layers in formats), default=0) or None,
    )
