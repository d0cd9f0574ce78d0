"""Decoders whose residual stream is rotated, against those as they are: the same function in
floats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from conftest import (
    FLOAT32,
    MOE_FIXTURES,
    PLAIN_INT4,
    Fixture,
    fixture_named,
    refusal,
    relative_error,
)
from test_decoder_blocks import BLOCKS, random_embeds, reference_logits
from test_graphs import decoder_spec, in_memory, open_decoder, sparse_spec

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.console import progress
from mobilevlm.export.calibration.samples import scene_samples
from mobilevlm.export.calibration.stages import calibrate
from mobilevlm.export.graph.author import author_decoder
from mobilevlm.export.quality.artifact_weights import artifact_weights, exact_weights
from mobilevlm.export.quality.layer_effects import weight_errors
from mobilevlm.export.quantize.folding import find_folds
from mobilevlm.export.quantize.rotation import rotation, rotation_obstacle
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.model import Model
from mobilevlm.recipe import LinearFormat
from mobilevlm.spec import ModelSpec

NAMES = ["mobilevlm_v2", "llava_v15", "vila", "instructblip", "llava_hf", "fast_vlm", "internvl3"]
NAMES += ["internvl35", "smolvlm2", "idefics3", "llava_next", "llava_onevision", *MOE_FIXTURES]
TURNED = LinearFormat("fp32", scaling="rotation")
ROTATED = replace(RECIPES["fp32"], decoder=TURNED)
SPECS: dict[str, ModelSpec] = {
    name: spec for name, spec in BLOCKS.items() if rotation_obstacle(spec.decoder) is None
} | {
    "biases": decoder_spec(qkv_bias=True, o_bias=True, mlp_bias=True, lm_head_bias=True),
    "a plain MLP": decoder_spec(mlp="plain", mlp_bias=True),
    "one norm for attention and MLP": decoder_spec(parallel_residual=True),
    "learned positions": decoder_spec(learned_positions=True, rotary_dim=0),
    "tied embeddings": decoder_spec(tie_word_embeddings=True),
    "a size without a Hadamard matrix": decoder_spec(
        hidden_size=92, head_dim=18, num_attention_heads=4, num_key_value_heads=2
    ),
    "experts beside a dense MLP": sparse_spec(use_residual=True),
}


def rotated_recipe(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(f'extends = "fp32"\n{text}\n')
    return str(path)


def exported(fixture: Fixture, folder: Path, text: str) -> Path:
    recipe, bundle = rotated_recipe(folder, text), folder / "bundle"
    mobilevlm.export(
        fixture.checkpoint,
        bundle,
        recipe=recipe,
        vision_tower=fixture.options.vision_tower,
        measure=False,
    )
    return bundle


@pytest.mark.parametrize("name", NAMES)
def test_every_family_gives_its_logits_with_a_rotated_stream(name: str, tmp_path: Path) -> None:
    fixture = fixture_named(name)
    spec = fixture.model.spec.decoder
    if spec.norm == "layer":
        assert rotation_obstacle(spec) == "norms that subtract the mean"
        return
    found = []
    for index, recipe in enumerate((RECIPES["fp32"], ROTATED)):
        path = tmp_path / f"{index}.onnx"
        author_decoder(fixture.model.weights, fixture.model.spec, recipe, path)
        found.append(open_decoder(path, spec).step(fixture.arrays["inputs_embeds"][0], 0))
    assert np.abs(found[1] - found[0]).max() < 1e-4


@pytest.mark.parametrize("name", SPECS)
def test_blocks_give_the_references_logits_with_a_rotated_stream(name: str, tmp_path: Path) -> None:
    model = in_memory(SPECS[name], tmp_path / "weights")
    embeds, path = random_embeds(model.spec.decoder.hidden_size), tmp_path / "decoder.onnx"
    author_decoder(model.weights, model.spec, ROTATED, path)
    found = open_decoder(path, model.spec.decoder).step(embeds, 0)
    assert relative_error(found, reference_logits(model, embeds)) <= FLOAT32


def test_both_graphs_of_a_rotated_bundle_share_keys_and_values(tmp_path: Path) -> None:
    """A prompt by one graph, the answer by the other."""
    fixture = fixture_named("smolvlm2")
    text = 'prefill = "fp32"\ndecoder = {precision = "fp32", scaling = "rotation"}'
    bundle = exported(fixture, tmp_path, text)
    with mobilevlm.load(bundle) as vlm:
        for as_prompt in (False, True):
            logits = vlm.embeds_logits(fixture.arrays["inputs_embeds"][0], as_prompt)
            assert relative_error(logits, fixture.logits) < 10 * FLOAT32
        length = len(fixture.generated_ids)
        answer = vlm.generate(
            fixture.prompt, fixture.images, max_new_tokens=length, ignore_eos=True
        )
    assert answer.token_ids == fixture.generated_ids


def test_a_rotated_export_has_the_same_bytes_again(tmp_path: Path) -> None:
    text = 'decoder = {precision = "q4", scaling = "rotation"}\nlm_head = "q8"'
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        bundle = exported(fixture_named("llava_v1"), tmp_path / name, text)
        found.append({entry.sha256 for entry in open_bundle(bundle).manifest.files.values()})
    assert found[0] == found[1]


def without_rounding(name: str, folder: Path, text: str) -> tuple[Model, dict[str, float]]:
    """Errors of the layers of a bundle as ``verify`` sees them."""
    model, bundle = (
        fixture_named(name).model,
        open_bundle(exported(fixture_named(name), folder, text)),
    )
    exact = exact_weights(model, bundle, "onnx")
    return model, weight_errors(exact, artifact_weights(model, bundle, "onnx"), model.spec)


@pytest.mark.parametrize("name", ["mobilevlm_v2", "moe_llava_qwen", "smolvlm2"])
def test_layers_of_a_rotated_bundle_are_read_back_as_they_were(name: str, tmp_path: Path) -> None:
    _, errors = without_rounding(name, tmp_path, 'decoder.scaling = "rotation"')
    assert max(errors.values()) < FLOAT32


def test_the_error_of_a_rotated_layer_is_that_of_its_rounding(tmp_path: Path) -> None:
    """8 bits in blocks of 32 are 0.5 % off, 4 bits 9 %."""
    text = 'decoder = {precision = "q4", scaling = "rotation"}\nlm_head = "q8"'
    _, errors = without_rounding("mobilevlm_v2", tmp_path, text)
    assert errors.pop("decoder.lm_head") < 0.012
    layers = [error for name, error in errors.items() if name.startswith("decoder.")]
    assert min(layers) > 0.05 and max(layers) < 0.15


def test_gptq_sees_the_rotated_inputs(mobilevlm_v2: Fixture) -> None:
    model, samples = mobilevlm_v2.model, scene_samples(2)
    gptq = LinearFormat("q4", "gptq")
    plain = replace(PLAIN_INT4, decoder=gptq, lm_head=gptq)
    turned = replace(plain, decoder=replace(gptq, scaling="rotation"))
    ours, theirs = (calibrate(model, recipe, samples, "decoder") for recipe in (turned, plain))
    size = model.spec.decoder.hidden_size
    for place in find_folds(model.spec):
        name = place.consumers[0]
        if not name.startswith("decoder."):
            continue
        found, exact = ours.hessian(name), theirs.hessian(name)
        assert found is not None and exact is not None
        if place.producer.endswith("norm"):
            gains = model.weights.read(f"{place.producer}.weight", (size,))
            turn = rotation(size)
        elif name.endswith(".o_proj"):
            gains, turn = np.ones(1, np.float32), rotation(model.spec.decoder.head_dim)
        else:
            assert relative_error(found, exact) < 1e-4, name
            continue
        expected = turn.of_outputs(turn.of_inputs(exact / gains / gains.reshape(-1, 1)))
        assert relative_error(found, expected) < 1e-4, name


def test_smoothquant_of_down_proj_goes_with_a_rotated_stream(tmp_path: Path) -> None:
    text = """
    calibration = "scenes"
    decoder = {precision = "int8", scaling = "rotation"}
    [layers]
    "decoder.layers.*.mlp.down_proj" = {precision = "int8", scaling = "smoothquant"}
    """
    _, errors = without_rounding("mobilevlm_v2", tmp_path, text)
    assert max(errors.values()) < 0.03


def test_factors_have_no_place_where_the_stream_is_rotated(
    mobilevlm_v2: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
    decoder = {precision = "int8", scaling = "rotation"}
    [layers]
    "decoder.layers.*.q_proj" = {precision = "int8", scaling = "smoothquant"}
    """
    recipe = rotated_recipe(tmp_path, text)
    arguments = ("export", mobilevlm_v2.checkpoint, "-o", tmp_path / "b", "--recipe", recipe)
    said = refusal(capsys, *arguments, "--vision-tower", mobilevlm_v2.tower)
    assert "nothing before takes the factors beside the decoder's rotation: leave it out" in said


def test_a_file_that_asks_for_what_layer_norms_cannot_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = fixture_named("moe_llava_phi2")
    recipe = rotated_recipe(tmp_path, 'decoder.scaling = "rotation"')
    arguments = ("export", fixture.checkpoint, "-o", tmp_path / "b", "--recipe", recipe)
    said = refusal(capsys, *arguments, "--vision-tower", fixture.tower)
    assert 'cannot be rotated, it has norms that subtract the mean: set scaling = "none"' in said


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_built_in_recipe_leaves_rotation_out_and_says_so(
    precision: Literal["fp32", "int8"],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = LinearFormat(precision, scaling="rotation")
    monkeypatch.setitem(RECIPES, precision, replace(RECIPES[precision], decoder=layers))
    progress.enable()
    fixture = fixture_named("moe_llava_phi2")
    manifest = mobilevlm.export(
        fixture.checkpoint, tmp_path / "b", recipe=precision, vision_tower=fixture.tower,
        measure=False,
    )  # fmt: skip
    assert not manifest.recipe.is_rotated
    assert "rotation    left out: the decoder of" in capsys.readouterr().err
