"""Recipes for LFM2-VL: calibration and measuring see runs of every shape, and products around short
convolutions are quantized."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT32, BundleOf, Fixture, fixture_named, relative_error

import mobilevlm
from mobilevlm.errors import QualityError
from mobilevlm.export.calibration.encoder_layers import watch_encoder
from mobilevlm.export.calibration.reference_states import decoder_states
from mobilevlm.export.calibration.samples import Sample, sample_pieces, sample_rows
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.quality.sensitivity import Change, Probe
from mobilevlm.export.quantize.rotation import rotated
from mobilevlm.linear_groups import LinearGroup, decoder_groups
from mobilevlm.preparation import prepare
from mobilevlm.prompt import count_rows
from mobilevlm.reference import load_reference

CONVOLUTION = "decoder.layers.3.short_conv"


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return fixture_named("lfm2_vl")


@pytest.fixture(scope="module")
def sample(fixture: Fixture) -> Sample:
    return Sample("What is it?", "A sign.", (fixture.image,))


def test_tower_and_decoder_are_calibrated_on_runs_of_every_shape(
    fixture: Fixture, sample: Sample, bundle_of: BundleOf
) -> None:
    model = fixture.model
    image = prepare(fixture.image, model.spec.image)
    blocks = watch_encoder(model, [sample], lambda name: name == "projector.mlp.1", False)
    found = {name: item for block in blocks for name, item in block.items()}
    assert found["projector.mlp.1"].count == count_rows(image.pieces) == 30
    reference = load_reference(model)
    exact = reference.embed(sample_pieces(model, sample), [reference.image_rows(image)])
    (state,) = decoder_states(model, load_reference(model, streamed=True), [sample])
    assert relative_error(state.hidden[0].numpy(), exact.numpy()) <= FLOAT32
    with mobilevlm.load(bundle_of("lfm2_vl", "fp32")) as vlm:
        vision, decoder = vlm._engines()
        rows = sample_rows(model, sample, vision, decoder.embed).embeds
    assert relative_error(rows, exact.numpy()) <= 1e-4


@pytest.mark.parametrize("layer", [f"{CONVOLUTION}.in_proj", f"{CONVOLUTION}.out_proj"])
def test_the_effect_of_a_product_around_a_convolution_reaches_the_answer(
    layer: str, fixture: Fixture, sample: Sample
) -> None:
    probe = Probe(fixture.model, [sample])

    def changes(group: LinearGroup) -> list[Change]:
        if group.name != layer:
            return []
        weight = fixture.model.weights.read(f"{group.name}.weight", (group.out_size, group.in_size))
        return [Change("half", np.asarray(weight) / np.float32(2))]

    ((_, _, effect),) = probe.effects(changes)
    assert effect.kl > 1e-6


def test_an_int8_bundle_has_its_figures_and_float_kernels(
    fixture: Fixture, bundle_of: BundleOf
) -> None:
    bundle = bundle_of("lfm2_vl", "int8", True)
    manifest = json.loads((Path(bundle) / "manifest.json").read_text())
    stages = manifest["quality"]["stages"]
    assert stages["vision"]["figures"]["cosine"] > 0.99
    assert stages["decoder"]["figures"]["kl"] < 0.2
    [path] = [part["path"] for part in manifest["artifacts"] if part["stage"] == "decoder"]
    model = fixture.model
    turned = rotated(model.weights, model.spec)
    stored = OnnxTensors(Path(bundle) / path, model.spec, model.weights)
    for group in decoder_groups(model.spec.decoder):
        if ".short_conv." in group.name:
            shape = group.out_size, group.in_size
            exact = np.asarray(turned.read(f"{group.name}.weight", shape))
            error = relative_error(stored.read(f"{group.name}.weight"), exact)
            assert 1e-4 < error < 0.02, group.name
    with mobilevlm.load(bundle) as vlm:
        found = vlm.prompt_logits(fixture.templated_prompt, [fixture.image], raw=True)
    assert relative_error(found, fixture.logits) < 0.5


def test_four_bits_beyond_the_limit_name_a_layer_and_are_kept_by_another_limit(
    fixture: Fixture, tmp_path: Path
) -> None:
    """Random weights between gates lose more by 4 bits than any that are trained."""
    with pytest.raises(QualityError, match=r"the limit is 0.001: decoder\.layers\.\d"):
        limits = {"decoder_kl": 0.001}
        mobilevlm.export(fixture.checkpoint, tmp_path / "refused", recipe="int4", limits=limits)
    bundle = tmp_path / "bundle"
    mobilevlm.export(fixture.checkpoint, bundle, recipe="int4", limits={"decoder_kl": 20.0})
    with mobilevlm.load(bundle) as vlm:
        answer = vlm.generate("What is this?", [fixture.image], max_new_tokens=4, ignore_eos=True)
    assert len(answer.token_ids) == 4


def test_a_calibrated_recipe_folds_into_the_norms_before_convolutions(
    fixture: Fixture, tmp_path: Path
) -> None:
    recipe, bundle = tmp_path / "recipe.toml", tmp_path / "bundle"
    recipe.write_text(
        'extends = "int8"\ncalibration = "scenes"\n[layers]\n'
        f'"{CONVOLUTION}.out_proj" = "fp16"\n"projector.mlp.1" = "fp32"\n'
        '[decoder]\nprecision = "int8"\nscaling = "smoothquant"\nquantizer = "gptq"\n'
    )
    mobilevlm.export(fixture.checkpoint, bundle, recipe=str(recipe), limits={"decoder_kl": 0.6})
    figures = json.loads((bundle / "manifest.json").read_text())["quality"]["stages"]
    assert figures["decoder"]["figures"]["kl"] < 0.2
