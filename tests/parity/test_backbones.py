"""Dense decoders that have no family yet, against the official arrays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FLOAT32, fixture_named, relative_error
from numpy.typing import NDArray
from test_graphs import open_decoder

from mobilevlm.checkpoint import TensorFiles, Weights
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.export.graph.author import author_decoder
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.families.backbones import Backbone, decoder_refs, inside
from mobilevlm.families.qwen_gemma import GEMMA3, QWEN2, QWEN3
from mobilevlm.model import Model
from mobilevlm.reference import load_reference

FOLDER = Path(__file__).parents[1] / "data" / "decoders"
BACKBONES = {"qwen2": QWEN2, "qwen3": QWEN3, "gemma3": GEMMA3}
Arrays = dict[str, NDArray[Any]]


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FOLDER / name / "config.json").read_text())
    return config


def read(name: str, **changes: Any) -> DecoderSpec:
    backbone = BACKBONES[name]
    return backbone.read(FOLDER / name / "config.json", {**config_of(name), **changes})


def model_of(name: str) -> Model:
    """The decoder behind the encoder of a fixture, which is not run."""
    base, spec = fixture_named("mobilevlm_v2").model, read(name)
    backbone: Backbone = inside(BACKBONES[name], "language_model")
    files = TensorFiles(FOLDER / name)
    others = {key: ref for key, ref in base.weights._refs.items() if not key.startswith("decoder.")}
    weights = Weights({**others, **decoder_refs(files, spec, backbone)})
    return replace(base, spec=replace(base.spec, decoder=spec), weights=weights)


def arrays_of(name: str) -> Arrays:
    with np.load(FOLDER / name / "expected.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_reference_gives_the_official_logits(name: str) -> None:
    arrays, reference = arrays_of(name), load_reference(model_of(name))
    mask = None
    if "mask_full" in arrays:  # a window cuts it in the sliding layers
        mask = torch.from_numpy(arrays["mask_full"].astype(bool))[None, None]
    with torch.no_grad():
        found = reference.decoder(torch.from_numpy(arrays["inputs_embeds"]), mask=mask)
    assert relative_error(found.numpy(), arrays["logits"]) <= FLOAT32


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_graph_gives_the_official_logits_and_tokens(name: str, tmp_path: Path) -> None:
    model, arrays = model_of(name), arrays_of(name)
    author_decoder(model.weights, model.spec, RECIPES["fp32"], tmp_path / "decoder.onnx")
    decoder = open_decoder(tmp_path / "decoder.onnx", model.spec.decoder)
    embeds = arrays["inputs_embeds"][0]
    logits = decoder.step(embeds, 0)
    assert relative_error(logits, arrays["logits"][0]) <= FLOAT32
    shape = (model.spec.decoder.vocab_size, model.spec.decoder.hidden_size)
    table = model.weights.read("decoder.embed_tokens.weight", shape)
    ids = arrays["generated_ids"]
    for index, expected in enumerate(arrays["step_logits"]):
        assert relative_error(logits[-1], expected) <= FLOAT32
        assert logits[-1].argmax() == ids[index]
        logits = decoder.step(table[ids[index : index + 1]], len(embeds) + index)


def test_the_graph_of_gemma_3_gives_the_references_logits_of_text(tmp_path: Path) -> None:
    """Without images, whose tokens see each other in both directions."""
    model, arrays = model_of("gemma3"), arrays_of("gemma3")
    ids = np.tile(arrays["generated_ids"], 3)
    author_decoder(model.weights, model.spec, RECIPES["fp32"], tmp_path / "decoder.onnx")
    with torch.no_grad():
        reference = load_reference(model)
        embeds = reference.embed(ids.tolist(), [])
        expected = reference.logits(embeds).numpy()
    decoder = open_decoder(tmp_path / "decoder.onnx", model.spec.decoder)
    pieces = [decoder.step(embeds[i : i + 9].numpy(), i) for i in range(0, len(ids), 9)]
    assert relative_error(np.concatenate(pieces), expected) <= FLOAT32


def test_norms_of_gemma_are_one_and_the_stored_weight_in_float32() -> None:
    model = model_of("gemma3")
    stored = TensorFiles(FOLDER / "gemma3").read(
        "language_model.model.layers.0.self_attn.q_norm.weight"
    )
    found = model.weights.read("decoder.layers.0.attn.q_norm.weight", stored.shape)
    assert np.array_equal(found, np.float32(1) + stored) and found.dtype == np.float32
    x = np.random.default_rng(0).standard_normal((100, *stored.shape), np.float32)
    assert np.array_equal(x * found, x * (np.float32(1) + stored))


def test_sizes_and_layers_come_from_the_configuration() -> None:
    assert (read("qwen3").head_dim, read("qwen3").hidden_size) == (24, 64)
    config = {key: value for key, value in config_of("qwen3").items() if key != "head_dim"}
    assert QWEN3.read(FOLDER, config).head_dim == 128
    assert read("qwen2").rope_scaling == 1.0 and read("qwen2").context_length == 32768
    gemma = read("gemma3")
    assert gemma.sliding_layers == (0, 1, 2, 3, 4, 6) and gemma.sliding_window == 24
    assert (gemma.rope_theta, gemma.rope_scaling, gemma.sliding_rope_theta) == (1e6, 8.0, 1e4)
    assert (gemma.embed_scale, gemma.attention_scale) == (48**0.5, 0.25)
    assert read("gemma3", sliding_window_pattern=2).sliding_layers == (0, 2, 4, 6)
    assert read("gemma3", final_logit_softcapping=30.0).logit_softcap == 30.0
    assert read("gemma3", attn_logit_softcapping=50.0).attention_softcap == 50.0
    windows = {"use_sliding_window": True, "sliding_window": 64}
    assert read("qwen2", **windows).sliding_layers == ()
    assert read("qwen2", **windows, max_window_layers=1).sliding_layers == (1, 2)
    types = ["full_attention", "sliding_attention", "full_attention"]
    assert read("qwen3", **windows, layer_types=types).sliding_layers == (1,)


def test_the_form_of_transformers_5_reads_the_same() -> None:
    joined = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    types = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    found = read("gemma3", rope_scaling=None, rope_parameters=joined, layer_types=types)
    assert found == read("gemma3")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ("qwen2", {"use_sliding_window": True}, "'sliding_window'"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": -1},
         "'max_window_layers' is -1"),
        ("gemma3", {"layer_types": ["full_attention"]}, "'layer_types'"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 7}, "'layer_types'"),
        ("gemma3", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        ("gemma3", {"hidden_activation": "silu"}, "'hidden_activation' is 'silu'"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar'"),
    ],
)  # fmt: skip
def test_what_no_block_does_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(name, **changes)
