"""Weights read back out of artifacts are those that the artifacts compute with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    FLOAT32,
    MOE_FIXTURES,
    BundleOf,
    Fixture,
    fixture_named,
    relative_error,
)

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.errors import BundleError
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.quality.artifact_weights import artifact_weights
from mobilevlm.export.quantize.rotation import rotated
from mobilevlm.linear_groups import linear_groups
from mobilevlm.model import Model
from mobilevlm.preparation import prepare
from mobilevlm.reference import load_reference

SCALED = """\
tower = { precision = "q8", scaling = "awq" }
projector = "fp32"
decoder = { precision = "q8", scaling = "awq", symmetric = false }
lm_head = { precision = "q4", scaling = "awq" }
embeddings = "fp32"
[limits]
vision_relative_error = 9
decoder_kl = 99
"""
WEIGHT_ONLY = """\
tower = "q4"
projector = "fp16"
decoder = { precision = "q4", block_size = 16, symmetric = false }
lm_head = "q8"
embeddings = "fp32"
[layers]
"decoder.layers.1.mlp.down_proj" = "q2"
[limits]
vision_relative_error = 9
decoder_kl = 99
"""
Q8_ACTIVATIONS = 0.02
"""MatMulNBits rounds activations to 8 bits in blocks of 32: 0.4 to 1.1 % of the outputs."""


def exported(fixture: Fixture, folder: Path, recipe: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(recipe)
    bundle = folder / "bundle"
    mobilevlm.export(
        fixture.checkpoint, bundle, recipe=str(path), vision_tower=fixture.tower, measure=False
    )
    return bundle


def linear_weights(model: Model) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.weight": (size, group.in_size)
        for group in linear_groups(model.spec)
        for name, size in zip(group.names, group.out_sizes, strict=True)
    }


def test_every_linear_layer_and_norm_of_a_float_bundle_is_the_checkpoints(
    any_fixture: Fixture, bundle_of: BundleOf
) -> None:
    bundle = open_bundle(bundle_of(any_fixture.name, "fp32"))
    model = any_fixture.model
    stored = artifact_weights(model, bundle, "onnx")
    read = []
    for stage in ("vision", "decoder"):
        path = bundle.path(bundle.artifact(stage, "onnx").path)
        source = OnnxTensors(path, model.spec, model.weights)
        for name in source.names:
            shape = source.shape(name)
            found, exact = stored.read(name, shape), model.weights.read(name, shape)
            np.testing.assert_array_equal(found, exact, err_msg=name)
        read += source.names
    assert set(linear_weights(model)) <= set(read)
    norms = {name for name in model.weights if ".layers." in name and "norm" in name}
    assert norms <= set(read) and "decoder.norm.weight" in read


def test_the_reference_with_an_artifacts_weights_computes_what_the_artifact_does(
    fixture: Fixture, tmp_path: Path
) -> None:
    """Up to its rounded activations: any block, zero point or stack in a wrong place would be as
    far off as 4 bits are, or further."""
    bundle = exported(fixture, tmp_path, WEIGHT_ONLY)
    model = fixture.model
    stored = dataclasses.replace(
        model, weights=artifact_weights(model, open_bundle(bundle), "onnx")
    )
    reference, exact = load_reference(stored), load_reference(model)
    pixels = prepare(fixture.image, model.spec.image).arrays[0]["pixels"]
    embeds = torch.from_numpy(fixture.arrays["inputs_embeds"][0])
    with mobilevlm.load(bundle) as vlm, torch.no_grad():
        visual = vlm.encode_image(fixture.image)
        logits = vlm.embeds_logits(embeds.numpy())
        assert relative_error(visual, reference.visual_tokens(pixels).numpy()) < Q8_ACTIVATIONS
        assert relative_error(logits, reference.logits(embeds).numpy()) < Q8_ACTIVATIONS
        # With the checkpoint's own weights it is much further off.
        assert relative_error(logits, exact.logits(embeds).numpy()) > 3 * Q8_ACTIVATIONS


@pytest.mark.parametrize("name", MOE_FIXTURES)
@pytest.mark.parametrize("experts", ["fused", "plain"])
def test_experts_come_back_from_one_operator_and_from_many(
    name: str, tmp_path: Path, experts: str
) -> None:
    """4 bits in blocks of 16 with zero points are 7 to 9 % off; a row, an expert or a gate in the
    place of another would be further off than the weights are large."""
    fixture = fixture_named(name)
    recipe = WEIGHT_ONLY.replace('"decoder.layers.1.mlp.down_proj" = "q2"\n', "")
    bundle = open_bundle(exported(fixture, tmp_path, f'experts = "{experts}"\n{recipe}'))
    model = fixture.model
    stored = artifact_weights(model, bundle, "onnx")
    names = [name for name in linear_weights(model) if ".experts." in name]
    assert names
    for linear in names:
        shape = linear_weights(model)[linear]
        error = relative_error(stored.read(linear, shape), model.weights.read(linear, shape))
        assert 0.01 < error < 0.12, linear
    router = next(name for name in model.weights if name.endswith(".router.weight"))
    source = OnnxTensors(
        bundle.path(bundle.artifact("decoder", "onnx").path), model.spec, model.weights
    )
    shape = source.shape(router)
    np.testing.assert_array_equal(source.read(router), model.weights.read(router, shape))


def test_factors_between_layers_go_back_to_where_they_were(
    mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    bundle = open_bundle(exported(mobilevlm_v2, tmp_path, SCALED))
    model = mobilevlm_v2.model
    stored = artifact_weights(model, bundle, "onnx")
    for name, shape in linear_weights(model).items():
        error = relative_error(stored.read(name, shape), model.weights.read(name, shape))
        # 8 bits in blocks of 32 are 0.5 % off; the head has 4 bits, 9 %.
        assert error < (0.15 if "lm_head" in name else 0.012), name
    for index in range(model.spec.decoder.num_hidden_layers):
        name = f"decoder.layers.{index}.input_norm.weight"
        shape = (model.spec.decoder.hidden_size,)
        assert relative_error(stored.read(name, shape), model.weights.read(name, shape)) < FLOAT32


def test_files_with_two_names_are_read_and_short_ones_refused(
    mobilevlm_v2: Fixture, bundle_of: BundleOf, tmp_path: Path
) -> None:
    """An export links what it reuses from the bundle before."""
    bundle = open_bundle(bundle_of("mobilevlm_v2", "int4"))
    artifact = bundle.artifact("decoder", "onnx")
    for name in artifact.files:
        (tmp_path / Path(name).name).hardlink_to(bundle.path(name))
    model, name = mobilevlm_v2.model, "decoder.layers.0.mlp.down_proj.weight"
    path = tmp_path / Path(artifact.path).name
    source = OnnxTensors(path, model.spec, model.weights)
    exact = model.weights.read(name, source.shape(name))
    turned = rotated(model.weights, model.spec).read(name, exact.shape)
    assert relative_error(source.read(name), turned) < 0.15  # 4 bits: 9 %
    data = tmp_path / Path(artifact.data[0]).name
    short = data.read_bytes()[: data.stat().st_size // 4]
    data.unlink()  # the bundle keeps its own
    data.write_bytes(short)
    with pytest.raises(BundleError, match="cannot be read"):
        OnnxTensors(path, model.spec, model.weights).read("decoder.lm_head.weight")


def test_a_damaged_graph_is_refused(
    mobilevlm_v2: Fixture, bundle_of: BundleOf, tmp_path: Path
) -> None:
    bundle = open_bundle(bundle_of("mobilevlm_v2", "int4"))
    data = bundle.path(bundle.artifact("decoder", "onnx").path).read_bytes()
    path = tmp_path / "decoder.onnx"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match="damaged ONNX file"):
        OnnxTensors(path, mobilevlm_v2.model.spec, mobilevlm_v2.model.weights)
