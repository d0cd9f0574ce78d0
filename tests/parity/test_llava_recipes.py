"""Calibration, measuring and quantizing see all tiles of an image, put together as in use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT32, BundleOf, Fixture, fixture_named, relative_error

import mobilevlm
from mobilevlm.export.calibration.encoder_layers import watch_encoder
from mobilevlm.export.calibration.reference_states import decoder_states
from mobilevlm.export.calibration.samples import Sample, sample_pieces, sample_rows
from mobilevlm.export.quality.sensitivity import Change, Probe
from mobilevlm.linear_groups import LinearGroup
from mobilevlm.preparation import prepare
from mobilevlm.prompt import count_positions
from mobilevlm.reference import load_reference

NAMES = ("llava_next", "llava_onevision", "llava_onevision_multi")


def sample_of(fixture: Fixture) -> Sample:
    return Sample("What is it?", "A sign.", tuple(fixture.images))


@pytest.fixture(params=NAMES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


def exact_embeds(fixture: Fixture) -> torch.Tensor:
    model, sample = fixture.model, sample_of(fixture)
    reference, count = load_reference(model), len(sample.images)
    with torch.no_grad():
        images = [
            reference.image_rows(prepare(image, model.spec.image, images=count))
            for image in sample.images
        ]
        return reference.embed(sample_pieces(model, sample), images)


def test_the_decoder_is_calibrated_on_the_rows_that_it_reads_in_use(
    fixture: Fixture, bundle_of: BundleOf
) -> None:
    model, sample, exact = fixture.model, sample_of(fixture), exact_embeds(fixture)
    (state,) = decoder_states(model, load_reference(model, streamed=True), [sample])
    assert relative_error(state.hidden[0].numpy(), exact.numpy()) <= FLOAT32
    with mobilevlm.load(bundle_of(fixture.name, "fp32")) as vlm:
        vision, decoder = vlm._engines()
        found = sample_rows(model, sample, vision, decoder.embed).embeds
    assert relative_error(found, exact.numpy()) <= 1e-4


def test_the_tower_is_calibrated_on_all_tiles(fixture: Fixture) -> None:
    model, sample = fixture.model, sample_of(fixture)
    blocks = watch_encoder(model, [sample], lambda name: name == "projector.mlp.0", False)
    with torch.no_grad():
        found = {name: item for block in blocks for name, item in block.items()}
    count, spec = len(sample.images), model.spec.image
    runs = sum(len(prepare(image, spec, images=count).arrays) for image in sample.images)
    assert found["projector.mlp.0"].count == runs * spec.connector.num_tokens


def test_the_effect_of_a_layer_of_the_projector_reaches_the_answer(fixture: Fixture) -> None:
    probe = Probe(fixture.model, [sample_of(fixture)])
    same = probe.joint_effect(lambda group: None)
    assert same.kl <= 1e-9 and same.top1_agreement == 1 and same.visual_error == 0

    def changes(group: LinearGroup) -> list[Change]:
        if group.name != "projector.mlp.1":
            return []
        weight = fixture.model.weights.read(f"{group.name}.weight", (group.out_size, group.in_size))
        return [Change("half", np.asarray(weight) / np.float32(2))]

    ((_, _, effect),) = probe.effects(changes)
    assert effect.kl > 1e-6 and effect.visual_error is not None and effect.visual_error > 0.1
    positions = count_positions(sample_pieces(fixture.model, sample_of(fixture)))
    assert probe.num_positions < positions


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_an_int8_bundle_has_its_figures_in_the_manifest(name: str, bundle_of: BundleOf) -> None:
    bundle = bundle_of(name, "int8", True)
    quality = json.loads((Path(bundle) / "manifest.json").read_text())["quality"]
    assert quality["measured"]
    assert quality["stages"]["vision"]["figures"]["cosine"] > 0.99
    assert quality["stages"]["decoder"]["figures"]["kl"] < 0.05
    with mobilevlm.load(bundle) as vlm:
        found = vlm.encode_image(fixture_named(name).image)
    expected = fixture_named(name).arrays["projector_output"]
    assert relative_error(found, expected) <= 0.1
    # The newline is stored in full.
    newline = fixture_named(name).model.weights.read("projector.newline", expected.shape[1:])
    assert np.abs(found - np.asarray(newline)).max(axis=1).min() == 0


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_graphs_for_npus_give_the_official_answer(name: str, tmp_path: Path) -> None:
    fixture, bundle = fixture_named(name), tmp_path / "bundle"
    formats = ["npu"]
    mobilevlm.export(fixture.checkpoint, bundle, recipe="fp32", formats=formats, measure=False)
    with mobilevlm.load(bundle, engine="npu") as vlm:
        found = vlm.prompt_logits(fixture.templated_prompt, fixture.images, raw=True)
        assert relative_error(found, fixture.logits) <= 1e-4
        prompt, images = fixture.templated_prompt, fixture.images
        answer = vlm.generate(prompt, images, raw=True, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


def test_a_fixed_point_tower_gives_the_newline_too(tmp_path: Path) -> None:
    fixture, bundle = fixture_named("llava_next"), tmp_path / "bundle"
    formats = ["npu"]
    mobilevlm.export(fixture.checkpoint, bundle, recipe="a16w8", formats=formats, measure=False)
    with mobilevlm.load(bundle, engine="npu") as vlm:
        found = vlm.encode_image(fixture.image)
    assert relative_error(found, fixture.arrays["projector_output"]) <= 0.05
