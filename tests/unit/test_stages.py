"""Factors of a recipe's calibrated methods: every place for them gets some."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import MOE_FIXTURES, fixture_named, memory_weights

from mobilevlm.export.calibration import stages
from mobilevlm.export.calibration.samples import scene_samples
from mobilevlm.export.calibration.stages import calibrate
from mobilevlm.export.graph.author import author_watched_layer
from mobilevlm.export.quantize.folding import Fold, find_folds
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.model import Model
from mobilevlm.recipe import LinearFormat, Recipe
from mobilevlm.reference import ReferenceModel


def scaled(scaling: Literal["awq", "smoothquant"]) -> Recipe:
    precision = "q4" if scaling == "awq" else "int8"
    layers = LinearFormat(precision, scaling=scaling)  # type: ignore[arg-type]
    return replace(RECIPES["fp32"], decoder=layers, lm_head=layers)


def check_factors(model: Model, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[str] = set()

    def fold(weights: object, factors: dict[Fold, object]) -> object:
        found.update(place.producer for place in factors)
        return weights

    monkeypatch.setattr(stages, "fold", fold)
    calibrate(model, recipe, scene_samples(2), "decoder")
    places = [place.producer for place in find_folds(model.spec)]
    assert sorted(found) == sorted(name for name in places if name.startswith("decoder."))


@pytest.mark.parametrize("scaling", ["awq", "smoothquant"])
@pytest.mark.parametrize("name", ["mobilevlm_v2", *MOE_FIXTURES])
def test_every_fold_of_a_decoder_gets_factors(
    name: str, scaling: Literal["awq", "smoothquant"], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_factors(fixture_named(name).model, scaled(scaling), monkeypatch)


def test_a_dense_mlp_beside_the_experts_is_watched_with_what_weighs_it(tmp_path: Path) -> None:
    base = fixture_named("moe_llava_qwen").model
    assert base.spec.decoder.experts is not None
    experts = replace(base.spec.decoder.experts, use_residual=True)
    spec = replace(base.spec, decoder=replace(base.spec.decoder, experts=experts))
    with torch.device("meta"):
        parameters = dict(ReferenceModel(spec).named_parameters())
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    weights = memory_weights(shapes, tmp_path)
    layer = next(i for i in range(spec.decoder.num_hidden_layers) if spec.decoder.num_experts(i))
    watched = author_watched_layer(weights, spec.decoder, layer, tmp_path / "layer.onnx")
    mlp = f"decoder.layers.{layer}.mlp"
    [readers] = [names for names in watched.values() if f"{mlp}.router" in names]
    assert {f"{mlp}.coefficient", f"{mlp}.residual.gate_proj"} < set(readers)
