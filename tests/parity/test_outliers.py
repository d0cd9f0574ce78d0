"""Activation outliers, planted where the float function stays as it is: one scale for all 8-bit
activations fails; a scale per token and SmoothQuant mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Fixture, relative_error
from numpy.typing import NDArray

from mobilevlm.builtin import checkpoint_path
from mobilevlm.export.calibration.samples import scene_samples
from mobilevlm.export.calibration.stages import calibrate
from mobilevlm.export.graph.author import author_decoder, author_encoded
from mobilevlm.export.quantize.folding import find_folds, fold
from mobilevlm.export.recipes.layer_formats import expand_layers
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model
from mobilevlm.nano.drawing import render as draw
from mobilevlm.nano.scenes import sample_scene
from mobilevlm.preparation import prepare
from mobilevlm.recipe import LinearFormat, Recipe, WeightBits
from mobilevlm.reference import load_reference
from mobilevlm.runtime.engines.onnx.engine import EXACT_PRODUCTS

Float32 = NDArray[np.float32]
OUTLIER = 60
"""How much larger two channels are: trained towers have factors of 50 to 100."""
UNSEEN = 1000
"""A scene that calibration does not draw."""


def with_outliers(model: Model) -> Model:
    folds = {}
    for place in find_folds(model.spec):
        factors = np.ones(place.in_size, np.float32)
        factors[[3, 17]] = 1 / OUTLIER
        folds[place] = place.tie(factors, np.min)
    return replace(model, weights=fold(model.weights, folds))


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    for name, text in EXACT_PRODUCTS.items():  # 8-bit weights on x86 without VNNI
        options.add_session_config_entry(name, text)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def features(
    model: Model, tower: LinearFormat | Recipe, images: Sequence[Any], folder: Path
) -> Float32:
    """Return the features of all images, ``(images, num_features, hidden_size)``."""
    if isinstance(tower, LinearFormat):
        tower = replace(RECIPES["fp32"], tower=tower)
    recipe = expand_layers(tower, model.spec)
    ready = calibrate(model, recipe, scene_samples(4), "vision")
    file = folder / "vision.onnx"
    author_encoded(ready.weights, model.spec, recipe, file, hessian=ready.hessian)
    tower_session = session(file)
    pixels = [prepare(image, model.spec.image).arrays[0]["pixels"][None] for image in images]
    return np.concatenate([tower_session.run(["features"], {"pixels": item})[0] for item in pixels])


TENSOR = LinearFormat("int8", activations="tensor")
SMOOTHED = LinearFormat("int8", scaling="smoothquant")


def test_a_scale_per_token_and_smoothquant_mend_what_outliers_break(
    mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    """Random weights. Measured: 0.029 per token without outliers; with them 0.64 per tensor, 0.34
    per token, and 0.039 once smoothed."""
    exact = mobilevlm_v2.arrays["vision_features"][0]
    model = with_outliers(mobilevlm_v2.model)
    errors = [
        relative_error(features(model, tower, [mobilevlm_v2.image], tmp_path)[0], exact)
        for tower in (LinearFormat("fp32"), TENSOR, LinearFormat("int8"), SMOOTHED)
    ]
    assert errors[0] < 1e-4
    assert errors[1] > 0.5
    assert 0.1 < errors[2] < 0.5
    assert errors[3] < 0.05


@cache
def nano() -> Model:
    """Trained, with outliers in tower and decoder."""
    return with_outliers(open_checkpoint(checkpoint_path(Path("nano"))))


@pytest.mark.parametrize("name", ["int8", "int8-calibrated"])
@pytest.mark.parametrize("weight_bits", [7, 8])
def test_features_of_a_trained_tower_with_outliers_stay_within_one_percent(
    weight_bits: WeightBits, name: str, tmp_path: Path
) -> None:
    model, pictures = nano(), [draw(sample_scene(UNSEEN + index)) for index in range(4)]
    calibrated = RECIPES[name].with_weight_bits(weight_bits, auto_only=True)
    per_tensor = replace(TENSOR, weight_bits=weight_bits)
    exact, found, broken = (
        features(model, tower, pictures, tmp_path)
        for tower in (LinearFormat("fp32"), calibrated, per_tensor)
    )
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) <= 0.01
    assert relative_error(broken, exact) > 0.2


def decoder_logits(model: Model, decoder: LinearFormat, embeds: Float32, folder: Path) -> Float32:
    recipe = replace(RECIPES["fp32"], decoder=decoder)
    ready = calibrate(model, recipe, scene_samples(4), "decoder")
    file = folder / "decoder.onnx"
    author_decoder(ready.weights, model.spec, recipe, file, hessian=ready.hessian)
    spec, length = model.spec.decoder, len(embeds)
    buffer = np.zeros((1, spec.num_key_value_heads, length, spec.head_dim), np.float32)
    inputs: dict[str, NDArray[Any]] = {
        "inputs_embeds": embeds[None],
        "total_length": np.array([length], np.int32),
        "logits_positions": np.arange(length),
    }
    for index in range(spec.num_hidden_layers):
        for part in ("key", "value"):
            inputs[f"past_key_values.{index}.{part}"] = buffer.copy()
    found: Float32 = session(file).run(["logits"], inputs)[0][0]
    return found


def token_embeddings(model: Model, ids: Sequence[int]) -> Float32:
    with torch.no_grad():
        found: Float32 = load_reference(model).embed(list(ids), []).numpy()
    return found


def test_a_decoder_with_outliers_keeps_its_logits(tmp_path: Path) -> None:
    """Measured: 0.81 with one scale per tensor, 0.086 smoothed (tokens of no scene)."""
    model = nano()
    embeds = token_embeddings(model, range(10, 40))
    exact = decoder_logits(model, LinearFormat("fp32"), embeds, tmp_path)
    broken, found = (decoder_logits(model, part, embeds, tmp_path) for part in (TENSOR, SMOOTHED))
    assert relative_error(broken, exact) > 0.5
    assert relative_error(found, exact) < 0.1
