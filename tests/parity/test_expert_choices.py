"""Experts chosen for each token, in every form of the decoder, against the official code."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import MOE_FIXTURES, Fixture, fixture_named
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.console.progress import ignore
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.plan import Plan
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines import ExpertChoices
from mobilevlm.runtime.engines.ggml.engine import GgmlDecoder
from mobilevlm.runtime.engines.opening import onnx_decoder

LLAMA = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)


@pytest.fixture(scope="module", params=MOE_FIXTURES)
def sparse(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


def exported(fixture: Fixture, form: str, folder: Path) -> Path:
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'tower = "fp32"\nprojector = "fp32"\ndecoder = "fp32"\nlm_head = "fp32"\n'
        f'embeddings = "fp32"\nexperts = "{form}"\n'
        "limits = { vision_relative_error = 1e-4, decoder_kl = 1e-6 }\n"
    )
    bundle = folder / form
    mobilevlm.export(
        fixture.checkpoint, bundle, recipe=str(recipe), vision_tower=fixture.tower, measure=False
    )
    return bundle


def stacked(choices: ExpertChoices, fixture: Fixture) -> NDArray[np.integer]:
    assert list(choices) == fixture.arrays["moe_layers"].tolist()
    return np.stack(list(choices.values()))


def prompt_choices(vlm: VLM, fixture: Fixture) -> NDArray[np.integer]:
    """Return the choices for a prompt, computed from the image and the text."""
    found = vlm.expert_choices(fixture.expected["user_prompt"], [fixture.image])
    tokens = fixture.model.spec.image.connector.num_tokens
    assert found.is_visual.sum() == tokens
    [start] = np.flatnonzero(fixture.arrays["input_ids"][0] < 0)
    assert found.is_visual[start : start + tokens].all()
    return stacked(found.layers, fixture)


@pytest.mark.parametrize("form", ["fused", "plain"])
def test_fp32_graphs_send_each_token_to_the_official_experts(
    sparse: Fixture, form: str, tmp_path: Path
) -> None:
    with mobilevlm.load(exported(sparse, form, tmp_path), "onnx") as vlm:
        assert np.array_equal(prompt_choices(vlm, sparse), sparse.chosen_experts)


def test_the_plain_graph_uses_the_experts_that_it_says(sparse: Fixture, tmp_path: Path) -> None:
    [path] = (exported(sparse, "plain", tmp_path) / "onnx").glob("decoder*.onnx")
    graph = onnx.load(path, load_external_data=False)
    chosen = [node.output[1] for node in graph.graph.node if node.op_type == "TopK"]
    graph.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in chosen
    )
    onnx.save(graph, path)
    spec, embeds = sparse.model.spec.decoder, sparse.arrays["inputs_embeds"]
    length = embeds.shape[1]
    past = np.zeros((1, spec.num_key_value_heads, length, spec.head_dim), np.float32)
    feeds = {
        f"past_key_values.{index}.{part}": past
        for index in range(spec.num_hidden_layers)
        for part in ("key", "value")
    }
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        chosen,
        {
            "inputs_embeds": embeds,
            "total_length": np.array([length], np.int32),
            "logits_positions": np.arange(length),
            **feeds,
        },
    )
    assert np.array_equal(np.stack(found), sparse.chosen_experts)


@LLAMA
def test_the_graph_of_ggml_sends_each_token_to_the_official_experts(
    sparse: Fixture, tmp_path: Path
) -> None:
    path = tmp_path / "decoder.gguf"
    write_decoder(sparse.model, "f32", path, ignore)
    embeds = sparse.arrays["inputs_embeds"][0]
    for threads in (1, 2):
        found = GgmlDecoder(path, sparse.model.spec.decoder, threads).expert_choices(embeds)
        assert np.array_equal(stacked(found, sparse), sparse.chosen_experts)


def test_choices_of_a_long_prompt_are_those_of_its_chunks(sparse: Fixture, tmp_path: Path) -> None:
    """The runtime computes 512 positions at a time; the last chunk may be short."""
    hidden = sparse.model.spec.decoder.hidden_size
    embeds = np.random.default_rng(0).standard_normal((520, hidden), np.float32)
    bundle = open_bundle(exported(sparse, "fused", tmp_path))
    decoder = onnx_decoder(bundle, bundle.path(bundle.artifact("decoder", "onnx").path), Plan())
    whole = stacked(decoder.expert_choices(embeds), sparse)
    first = stacked(decoder.expert_choices(embeds[:512]), sparse)
    assert whole.shape[1] == 520
    assert np.array_equal(whole[:, :512], first)


def test_a_dense_decoder_has_no_choices(vlm: VLM) -> None:
    with pytest.raises(MobileVLMError, match="no experts"):
        vlm.expert_choices("What is this?")
