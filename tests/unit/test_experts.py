"""Sparse experts around the graphs: configurations that are refused, calibration, how many weights
a token reads, and what GGUF files cannot hold."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MOE_FIXTURES, PLAIN_INT4, Fixture, fixture_named, refusal, run_program

from mobilevlm.bundle import open_bundle
from mobilevlm.checkpoint import TensorFiles, TensorRef, Weights
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError, MobileVLMError
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.calibration.stages import calibrate
from mobilevlm.export.graph.author import author_decoder
from mobilevlm.export.pipeline import export
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.families import open_checkpoint
from mobilevlm.gguf.architectures import gguf_architecture
from mobilevlm.model import Model, OpenOptions
from mobilevlm.recipe import LinearFormat, Recipe


@pytest.fixture(scope="module")
def stablelm() -> Fixture:
    return fixture_named("moe_llava_stablelm")


def changed(fixture: Fixture, folder: Path, moe: Any = None, **settings: Any) -> Path:
    """A copy of the checkpoint with other keys; ``moe``: of that block, or what stands instead."""
    shutil.copytree(fixture.checkpoint, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["moe"] = {**config["moe"], **moe} if isinstance(moe, dict) else moe or config["moe"]
    path.write_text(json.dumps({**config, **settings}))
    return folder


def open_changed(fixture: Fixture, folder: Path, **settings: Any) -> Model:
    return open_checkpoint(changed(fixture, folder, **settings), OpenOptions(fixture.tower))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"moe": "yes"}, "'moe' is 'yes', expected an object"),
    ({"moe": {"moe_layers_idx": [0, 4]}}, "'moe.moe_layers_idx' is [0, 4], expected layers from 0"),
    ({"moe": {"moe_layers_idx": [0, 0]}}, "'moe.moe_layers_idx' is [0, 0]"),
    ({"moe": {"moe_layers_idx": None, "moe_mode": "odd"}}, "'moe.moe_mode' is 'odd'"),
    ({"moe": {"num_experts": [4, 4, 4]}}, "'moe.num_experts' is [4, 4, 4]"),
    ({"moe": {"num_experts": [4, 1]}}, "none below 2 ('top_k_experts')"),
    ({"moe": {"top_k_experts": 0}}, "'top_k_experts' is 0"),
    ({"moe": {"num_experts": [5]}}, "deepspeed_experts.4"),
    ({"image_projector_type": "qformer4_36"}, "type 'qformer4_36' is not supported"),
    ({"image_projector_type": "cheap_simple_in1_out1"}, "expected linear, mlp2x_gelu"),
    ({"image_projector_type": "mlp3x_gelu"}, "image_spatial_proj.4"),
    ({"rope_pct": 0.2}, "'rope_pct' 0.2 of 16 channels are 3, expected an even number"),
    ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', expected 'silu'"),
    ({"vocab_size": 700}, "the tokenizer has 789 tokens, but 'vocab_size' in config.json is 700"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[row[1] for row in WRONG])
def test_a_wrong_configuration_is_named(
    settings: dict[str, Any], message: str, stablelm: Fixture, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_changed(stablelm, tmp_path / "checkpoint", **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_layers_and_numbers_may_be_written_short(stablelm: Fixture, tmp_path: Path) -> None:
    moe = {"moe_layers_idx": None, "num_experts": [4]}
    model = open_changed(stablelm, tmp_path / "checkpoint", moe=moe)
    assert model.spec.decoder.experts == stablelm.model.spec.decoder.experts


def test_pooling_before_the_projector_is_known(stablelm: Fixture, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"image_spatial_proj\.block\.0"):
        open_changed(stablelm, tmp_path / "c", image_projector_type="pool_mlp2x_gelu")


def test_norms_of_queries_and_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="qk_layernorm"):
        open_changed(fixture_named("moe_llava_phi2"), tmp_path / "c", qk_layernorm=True)


@pytest.mark.parametrize("name", MOE_FIXTURES)
def test_the_copy_of_the_tower_is_not_read(name: str) -> None:
    weights = fixture_named(name).model.weights
    tower = [ref for key, ref in weights._refs.items() if key.startswith("vision.")]
    assert {ref.files.folder for ref in tower} == {fixture_named(name).tower}


def test_rows_of_a_fused_tensor_are_cut_where_query_key_and_value_meet() -> None:
    fixture = fixture_named("moe_llava_qwen")
    stored = TensorFiles(fixture.checkpoint).read("transformer.h.1.attn.c_attn.weight")
    read = fixture.model.weights.read
    parts = [read(f"decoder.layers.1.attn.{part}_proj.weight", (64, 64)) for part in "qkv"]
    assert np.array_equal(np.concatenate(parts), stored)
    assert fixture.model.weights.size("decoder.layers.1.attn.q_proj.bias") == 64


SAMPLES = [Sample("What is this?", "A house.", ()), Sample("And this?", "", ())]


def formats(**changes: Any) -> Recipe:
    layers = LinearFormat("q4", **changes)
    return replace(PLAIN_INT4, decoder=layers, lm_head=layers)


@pytest.mark.parametrize("name", MOE_FIXTURES)
@pytest.mark.parametrize(
    "changes", [{"quantizer": "gptq"}, {"scaling": "awq"}, {"quantizer": "hqq", "symmetric": False}]
)
def test_calibrated_methods_reach_the_experts(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Also those that no calibration token chose: 30 tokens, 8 experts."""
    model, recipe = fixture_named(name).model, formats(**changes)
    ready = calibrate(model, recipe, SAMPLES, "decoder")
    found = author_decoder(
        ready.weights, model.spec, recipe, tmp_path / "d.onnx", hessian=ready.hessian
    )
    reader = model.spec.decoder.mlp_linears[0][0]
    for expert in range(4):
        label = f"decoder.layers.2.mlp.experts.{expert}.{reader}"
        [error] = [error for key, error in found.errors.items() if key.startswith(label)]
        assert 0.03 < error < 0.2  # rounding to nearest makes 0.09


def author(fixture: Fixture, recipe: Recipe, folder: Path, **decoder: Any) -> int:
    """Bytes that a token reads, and no error."""
    spec = fixture.model.spec
    spec = replace(spec, decoder=replace(spec.decoder, **decoder))
    found = author_decoder(fixture.model.weights, spec, recipe, folder / "d.onnx").bytes_per_token
    assert found is not None
    return found


def test_a_token_reads_half_of_the_experts(stablelm: Fixture, tmp_path: Path) -> None:
    """Two of four, in both forms: 64 x 96 weights in each of three matrices of four bytes."""
    experts = 2 * 4 * 3 * 64 * 96 * 4
    for form in ("fused", "plain"):
        recipe = replace(RECIPES["fp32"], experts=form)
        found = author(stablelm, recipe, tmp_path)
        everything = sum(path.stat().st_size for path in tmp_path.iterdir())
        # What is left: the graph itself and padding to whole pages.
        assert 0 <= everything - (found + experts / 2) < 0.25 * everything


def test_fused_experts_halve_blocks_until_they_divide_the_channels(
    stablelm: Fixture, tmp_path: Path
) -> None:
    """64 and 96 channels."""
    for asked, stored in ((128, 32), (64, 32), (16, 16)):
        author(stablelm, formats(block_size=asked), tmp_path)
        graph = onnx.load(tmp_path / "d.onnx", load_external_data=False).graph
        found = {
            attribute.i
            for node in graph.node
            for attribute in node.attribute
            if node.op_type == "QMoE" and attribute.name == "block_size"
        }
        assert found == {stored}


def test_channels_that_no_block_divides_need_the_plain_form(
    stablelm: Fixture, tmp_path: Path
) -> None:
    with pytest.raises(
        MobileVLMError, match=r'multiples of a block.*found 64 and 88.*experts = "plain"'
    ):
        author(stablelm, formats(), tmp_path, intermediate_size=88)


class ByExpert(Recipe):
    """A recipe whose first expert of each layer has eight bits."""

    def format_of(self, name: str) -> LinearFormat:
        return LinearFormat("q8") if ".experts.0." in name else super().format_of(name)


def test_experts_of_several_precisions_need_the_plain_form(
    stablelm: Fixture, tmp_path: Path
) -> None:
    base = PLAIN_INT4
    recipe = ByExpert(**{name: getattr(base, name) for name in base.__dataclass_fields__})
    with pytest.raises(MobileVLMError, match=r'several formats.*experts = "plain"'):
        author(stablelm, recipe, tmp_path)
    smaller = author(stablelm, replace(base, experts="plain"), tmp_path)
    assert author(stablelm, replace(recipe, experts="plain"), tmp_path) > smaller


def test_a_gated_gelu_needs_the_plain_form(stablelm: Fixture, tmp_path: Path) -> None:
    with pytest.raises(MobileVLMError, match="no gated MLP with gelu_new"):
        author(stablelm, PLAIN_INT4, tmp_path, hidden_act="gelu_new")


@pytest.mark.parametrize("name", MOE_FIXTURES)
def test_importance_matrices_are_refused_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = fixture_named(name)
    given = [fixture.checkpoint, "--vision-tower", fixture.tower, "-o"]
    for kind in ("q4_k_m", "q4_0"):
        wanted = ["--format", "gguf", "--gguf-type", kind, "--calibration", "scenes"]
        said = refusal(capsys, "export", *given, tmp_path / "b", *wanted)
        assert "importance matrices are for llama.cpp's architectures, this decoder's" in said
        assert "leave --imatrix and --calibration out" in said
    said = refusal(capsys, "imatrix", *given, tmp_path / "matrix.gguf")
    assert "importance matrices are for llama.cpp's architectures" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "moe-llava-phi2"),
        ({"experts": None}, "mobilevlm"),
        ({"norm": "rms"}, "mobilevlm"),
        ({"qk_norm": True}, "moe-llava-phi2"),
    ],
)
def test_what_llama_cpp_has_no_architecture_for_gets_one_of_our_own(
    changes: dict[str, Any], architecture: str
) -> None:
    spec = fixture_named("moe_llava_phi2").model.spec.decoder
    assert gguf_architecture(replace(spec, **changes)) == architecture


def test_inspect_shows_what_a_token_needs(stablelm: Fixture, tmp_path: Path) -> None:
    done = run_program("inspect", stablelm.checkpoint, "--vision-tower", stablelm.tower, "--json")
    parameters = json.loads(done.stdout)["parameters"]
    idle = 2 * 2 * 3 * 64 * 96  # two layers, two of four experts
    total = parameters["vision"] + parameters["projector"] + parameters["decoder"]
    assert parameters["activated"] == total - idle
    export(stablelm.checkpoint, tmp_path / "b", vision_tower=stablelm.tower, measure=False)
    artifacts = open_bundle(tmp_path / "b").manifest.artifacts
    [needed] = [item.bytes_per_token for item in artifacts if item.stage == "decoder"]
    assert needed is not None and needed > 0
    assert f"a token reads {needed / 1e6:.1f} MB" in run_program("inspect", tmp_path / "b").stdout


def test_a_tied_head_is_cut_with_the_table(stablelm: Fixture, tmp_path: Path) -> None:
    model = open_changed(stablelm, tmp_path / "c", tie_word_embeddings=True)
    shape = (model.spec.decoder.vocab_size, 64)
    table, head = (
        model.weights.read(f"decoder.{name}.weight", shape) for name in ("embed_tokens", "lm_head")
    )
    assert np.array_equal(table, head)


def test_a_part_of_a_tensor_must_fit_the_stored_one(stablelm: Fixture) -> None:
    files = TensorFiles(stablelm.checkpoint)
    name = "model.embed_tokens.weight"
    weights = Weights({"table": TensorRef(files, name)}).first_rows(["table"], 789, 801)
    with pytest.raises(CheckpointError, match=r"has shape \[800, 64\], expected \[801, 64\]"):
        weights.read("table", (789, 64))


def test_a_layer_without_experts_has_none() -> None:
    assert isinstance(spec := fixture_named("moe_llava_qwen").model.spec.decoder, DecoderSpec)
    assert [spec.num_experts(layer) for layer in range(4)] == [4, 0, 4, 0]
