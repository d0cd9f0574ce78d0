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
from mobilevlm.export.calibration.data import find_samples, find_shown
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.calibration.stages import calibrate, calibration_key
from mobilevlm.export.formats import (
    EMBEDDINGS,
    ENCODED,
    QDQ_TOOLS,
    Job,
    Written,
    encoder_settings,
    make_job,
    refuse,
)
from mobilevlm.export.recipes.layer_formats import bits_per_weight
from mobilevlm.image_encoder import NativeEncoder
from mobilevlm.linear_groups import LinearGroup, linear_groups, output_groups
from mobilevlm.model import Model
from mobilevlm.plain_types import to_dict
from mobilevlm.recipe import QDQ, Recipe
from mobilevlm.spec import ModelSpec

DECODER = ("decoder.layers.", "decoder.layer_inputs.", "decoder.norm.", "decoder.lm_head.")
ENCODER = ("decoder.encoder.",)
HEAD = ("image_head.", "decoder.norm.")  # of a rotated decoder the norm is in the head
CODES, IMAGE_DECODER = ("codes.",), ("image_decoder.",)


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
    if recipe.kv_cache != "fp32":
        check_cache(model)
    in_fixed_point = recipe.tower.precision in QDQ
    if in_fixed_point:
        check_onnx()
    samples = find_samples(recipe.calibration, model) if recipe.decoder_is_calibrated else []
    shown = []
    if recipe.is_calibrated and model.spec.encoded is not None:
        shown = find_shown(recipe, model)
    spec, plain = to_dict(model.spec.decoder), replace(recipe, operators="runtime")
    cache = [] if recipe.kv_cache == "fp32" else _cache_settings(model, recipe, samples)
    stages = []
    if model.spec.encoded is not None:
        stage = model.spec.encoder_stage
        stages += [
            _Stage(
                stage, f"{stage}_encoder", recipe.tower.precision, ENCODED, recipe,
                encoder_settings(model.spec),
                partial(author_qdq, shown) if in_fixed_point else author.author_encoded,
            ),
        ]  # fmt: skip
    stages += [
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
    if model.spec.draws:
        stages += _drawing_stages(model.spec, plain)
    return [
        _job(model, shown if stage.name in ("vision", "audio") else samples, stage)
        for stage in stages
    ]


def _drawing_stages(spec: ModelSpec, recipe: Recipe) -> list[_Stage]:
    """Return the files of a model that makes images."""
    from mobilevlm.export.graph import author

    recipe = replace(recipe, projector=recipe.projector.without_data())
    layers, stored = recipe.projector.precision, recipe.embeddings
    settings = [to_dict(spec.drawing), spec.decoder.hidden_size]
    return [
        _Stage(
            "image_head", "image_head", layers, HEAD, recipe, [*settings, recipe.is_rotated],
            author.author_image_head,
        ),
        _Stage(
            "code_embeddings", "code_embeddings", layers, CODES, recipe, settings,
            author.author_code_embeddings,
        ),
        _Stage(
            "image_decoder", "image_decoder", stored, IMAGE_DECODER, recipe, [*settings, stored],
            author.author_image_decoder,
        ),
    ]  # fmt: skip


def _groups(spec: ModelSpec) -> list[LinearGroup]:
    """Return the linear layers of all stages."""
    outputs = output_groups(spec.drawing, spec.decoder.hidden_size) if spec.draws else ()
    return [*linear_groups(spec), *outputs]


def _cache_settings(model: Model, recipe: Recipe, samples: list[Sample]) -> list[Any]:
    """Return what the scales of keys and values depend on: samples run through all stages."""
    groups = linear_groups(model.spec)
    formats = [to_dict(recipe.format_of(name)) for group in groups for name in group.names]
    measured = [formats, recipe.embeddings, recipe.experts, recipe.operators, recipe.layer_norm]
    return [recipe.kv_cache, measured, calibration_key(model, samples)]


def _refusals(spec: ModelSpec, recipe: Recipe) -> list[tuple[bool, str]]:
    """Return the conditions that rule these graphs out, each with its error line."""
    who, encoded = f"recipe {recipe.name!r}", spec.decoder.encoder_layers > 0
    vision = {recipe.tower.precision, recipe.projector.precision}
    decoder = recipe.decoder.needs_reference or recipe.lm_head.needs_reference
    image = spec.encoded
    is_native = image is not None and isinstance(image.encoder, NativeEncoder)
    return [
        (
            spec.has_sound and (recipe.elementary or bool(vision & {*QDQ})),
            f"{who}: elementary operators and fixed point are for images, and {spec.name} takes "
            f"sound: choose another recipe or target",
        ),
        (
            is_native and (recipe.elementary or bool(vision & {*QDQ})),
            f"{who}: elementary operators and fixed point are for images of one size, and "
            f"{spec.name} takes images of any: choose another recipe or target",
        ),
        (
            spec.draws and recipe.projector.precision in QDQ,
            f"{who}: {spec.name} draws, and its output projector is not in fixed point: give "
            f"projector another precision",
        ),
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
    groups = [group for group in _groups(spec) if f"{group.name}.".startswith(stage.prefixes)]
    formats = [recipe.format_of(name) for group in groups for name in group.names]
    settings = [*map(to_dict, formats), *stage.settings]
    if recipe.elementary:
        settings += [recipe.operators, recipe.layer_norm]
    referred = any(layers.needs_reference for layers in formats)
    if recipe.is_rotated and stage.prefixes == DECODER:
        settings.append("rotated")
    if referred:
        settings.append(calibration_key(model, samples))
    if precision in QDQ:
        settings += [recipe.layer_norm, calibration_key(model, samples)]
        settings += map(importlib.metadata.version, QDQ_TOOLS)

    def author(file: Path, advance: Advance) -> Written:
        if not referred or stage.name == "encoder":
            return stage.write(model.weights, spec, recipe, file, advance)
        part = spec.encoder_stage if stage.name in ("vision", "audio") else "decoder"
        ready = calibrate(model, recipe, samples, part)
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
