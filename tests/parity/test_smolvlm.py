"""SmolVLM's images of several tiles through recipes, calibration and measuring of single layers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BundleOf, fixture_named

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.export.calibration.encoder_layers import watch_encoder
from mobilevlm.export.calibration.samples import Sample, scene_samples
from mobilevlm.export.quality.sensitivity import Change, Probe
from mobilevlm.linear_groups import LinearGroup, projector_groups
from mobilevlm.preparation import prepare
from mobilevlm.reference import load_reference

FIXTURE = fixture_named("smolvlm2")
WORDS = Sample("What is red?", "Blood is.", ())


@pytest.mark.parametrize("name", ["smolvlm2", "idefics3"])
@pytest.mark.parametrize(("recipe", "kl"), [("int8", 0.02), ("int4", 0.6)])
def test_recipes_have_measured_figures(
    name: str, recipe: str, kl: float, bundle_of: BundleOf
) -> None:
    """About twice what was measured: 0.007 and 0.23 (smolvlm2), 0.009 and 0.33 (idefics3); random
    weights are the worst case."""
    quality = open_bundle(bundle_of(name, recipe, measure=True)).manifest.quality
    assert quality is not None
    assert quality.stages["vision"].figures["relative_error"] <= 0.06
    assert 0 < quality.stages["decoder"].figures["kl"] <= kl


def test_statistics_of_tower_and_connector_are_of_all_tiles() -> None:
    image = fixture_named("smolvlm2").image
    tiles = len(prepare(image, FIXTURE.model.spec.image).arrays)
    samples = [Sample("Who?", "", (image,)), WORDS]
    with torch.no_grad():
        blocks = list(watch_encoder(FIXTURE.model, samples, lambda name: True, False))
    counts = {name: found.count for block in blocks for name, found in block.items()}
    assert tiles == 13
    assert counts["vision.layers.0.attn.q_proj"] == counts["vision.layers.2.mlp.fc2"] == 64 * tiles
    assert counts["projector.mlp.0"] == 4 * tiles


def test_calibrated_recipes_know_the_tower_and_the_connector(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    mobilevlm.export(FIXTURE.checkpoint, bundle, recipe="int8-calibrated", measure=False)
    with mobilevlm.load(bundle) as vlm:
        found = vlm.encode_image(FIXTURE.image)
    expected = FIXTURE.arrays["projector_output"].reshape(found.shape)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.05


def test_a_change_of_the_connector_shows_in_the_tokens_of_all_tiles() -> None:
    model = FIXTURE.model
    samples = [*scene_samples(2), WORDS]
    (group,) = projector_groups(model.spec.image.connector)
    weight = model.weights.read(f"{group.name}.weight", (group.out_size, group.in_size))

    def changes(asked: LinearGroup) -> Iterable[Change]:
        if asked == group:
            yield Change("halved", weight / np.float32(2))

    with torch.no_grad():
        ((_, _, effect),) = Probe(model, samples).effects(changes)
    assert effect.visual_error == pytest.approx(0.5, rel=1e-4)
    assert effect.kl > 1e-3


def test_a_layer_alone_has_the_error_of_whole_passes() -> None:
    model, reference = FIXTURE.model, load_reference(FIXTURE.model)
    samples = scene_samples(1)
    name, size = "vision.layers.1.mlp.fc2", (48, 96)
    weight = model.weights.read(f"{name}.weight", size)
    noise = np.random.default_rng(0).standard_normal(size, np.float32) * weight.std() * 0.3
    (image,) = samples[0].images
    runs = prepare(image, model.spec.image).arrays
    with torch.no_grad():
        before = torch.cat([reference.visual_tokens(**arrays) for arrays in runs])
        reference.get_submodule(name).weight.data = torch.from_numpy(weight + noise)
        after = torch.cat([reference.visual_tokens(**arrays) for arrays in runs])
        found = [
            effect.visual_error
            for _, _, effect in Probe(model, samples).effects(
                lambda group: [Change("noise", weight + noise)] if group.name == name else []
            )
        ]
    assert len(runs) > 1
    assert found == [pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)]
