"""Blocks of decoders in tiny specs with random weights: the graphs for CPUs and those of fixed
shapes against the torch reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import FLOAT32, PLAIN_INT4, fixture_named, relative_error
from numpy.typing import NDArray
from test_graphs import (
    CAPACITY,
    QUANTIZED,
    Decoder,
    RoundedWeights,
    decoder_spec,
    in_memory,
    open_decoder,
    open_session,
)
from test_npu_graphs import CHUNK, FIXED, fixed_decoder, opened, row_errors, short

from mobilevlm.export.finish.kv_cache import rewrite
from mobilevlm.export.graph.author import (
    ChunkShape,
    author_decoder,
    author_embeddings,
    author_static_decoder,
)
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.quantize.folding import find_folds, fold
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.model import Model
from mobilevlm.prompt import Rows
from mobilevlm.reference import load_reference
from mobilevlm.spec import ModelSpec

Float32 = NDArray[np.float32]
INT8_CACHE = 0.044
"""As in test_kv_cache.py"""
LENGTH = 70
"""Positions of a prompt"""

GEMMA = {
    "qk_norm": True,
    "post_norms": True,
    "hidden_act": "gelu_new",
    "num_key_value_heads": 2,
    "head_dim": 24,
    "attention_scale": 0.2,
    "attention_softcap": 2.0,
    "logit_softcap": 3.0,
    "tie_word_embeddings": True,
    "embed_scale": 11.3,
}
LAYERS = decoder_spec().decoder.num_hidden_layers
SLIDING = {
    "sliding_window": 20,
    "sliding_layers": tuple(range(LAYERS - 1)),
    "sliding_rope_theta": 100.0,
    "rope_scaling": 8.0,
}
BLOCKS = {
    "heads of 12": decoder_spec(head_dim=12),
    "heads of 20, grouped": decoder_spec(head_dim=20, num_key_value_heads=2),
    "heads of 100": decoder_spec(head_dim=100, num_attention_heads=2, num_key_value_heads=2),
    "attention scale": decoder_spec(attention_scale=0.1),
    "query and key norms": decoder_spec(qk_norm=True, num_key_value_heads=2, qkv_bias=True),
    "query and key norms of padded heads": decoder_spec(qk_norm=True, head_dim=20),
    "query and key norms of wide heads": decoder_spec(qk_norm=True, head_dim=48),
    "query and key norms, partial rotary": decoder_spec(qk_norm=True, head_dim=24, rotary_dim=6),
    "query and key norms beside layer norms": decoder_spec(qk_norm=True, norm="layer"),
    "post norms": decoder_spec(post_norms=True),
    "post norms with biases": decoder_spec(post_norms=True, norm="layer"),
    "soft cap of scores": decoder_spec(attention_softcap=0.5, attention_scale=1.0),
    "soft cap of logits": decoder_spec(logit_softcap=0.5),
    "Gemma's blocks": decoder_spec(**GEMMA),
    "sliding windows": decoder_spec(sliding_window=8, sliding_layers=(0,), num_key_value_heads=2),
    "a window of one position": decoder_spec(sliding_window=1, sliding_layers=(1,)),
    "a window in all layers": decoder_spec(
        sliding_window=24, sliding_layers=tuple(range(LAYERS)), sliding_rope_theta=1e3
    ),
    "sliding windows with a base of their own": decoder_spec(**SLIDING),
    "sliding windows, rotary outside attention": decoder_spec(**SLIDING, rotary_dim=6),
    "Gemma 3": decoder_spec(**GEMMA, **SLIDING),
}


@pytest.fixture(params=BLOCKS)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return BLOCKS[request.param]


@pytest.fixture
def model(spec: ModelSpec, tmp_path: Path) -> Model:
    return in_memory(spec, tmp_path / "weights")


@pytest.fixture
def embeds(spec: ModelSpec) -> Float32:
    return random_embeds(spec.decoder.hidden_size)


def random_embeds(size: int) -> Float32:
    return np.random.default_rng(2).standard_normal((LENGTH, size), np.float32)


@torch.no_grad()
def reference_logits(model: Model, embeds: Float32) -> Float32:
    logits: Float32 = load_reference(model).logits(torch.from_numpy(embeds)).numpy()
    return logits


def test_the_float_graph_gives_the_references_logits_in_one_piece_and_in_chunks(
    model: Model, embeds: Float32, tmp_path: Path
) -> None:
    path = tmp_path / "decoder.onnx"
    author_decoder(model.weights, model.spec, RECIPES["fp32"], path)
    expected = reference_logits(model, embeds)
    decoder = open_decoder(path, model.spec.decoder)
    assert relative_error(decoder.step(embeds, 0), expected) <= FLOAT32
    ends = [0, 1, 40, 41, 42, LENGTH]
    found = [decoder.step(embeds[i:j], i) for i, j in pairwise(ends)]
    assert relative_error(np.concatenate(found), expected) <= FLOAT32


# Limits as in test_graphs.py: what is left is the rounding of activations to 8 bits.
@pytest.mark.parametrize("spec", ["query and key norms", "Gemma 3"], indirect=True)
@pytest.mark.parametrize(("recipe", "limit"), [("int8", 0.06), ("hqq", 0.033)])
def test_a_quantized_graph_equals_the_reference_with_its_rounded_weights(
    recipe: str, limit: float, model: Model, embeds: Float32, tmp_path: Path
) -> None:
    path = tmp_path / "decoder.onnx"
    author_decoder(model.weights, model.spec, QUANTIZED[recipe], path)
    found = open_decoder(path, model.spec.decoder).step(embeds, 0)
    rounded = replace(model, weights=RoundedWeights(model, QUANTIZED[recipe]))
    assert relative_error(found, reference_logits(rounded, embeds)) <= limit


@pytest.mark.parametrize(
    ("spec", "operators"),
    [*((name, "runtime") for name in BLOCKS), ("Gemma 3", "elementary")],
    indirect=["spec"],
)
def test_float_graphs_of_fixed_shapes_give_the_references_logits(
    operators: Literal["runtime", "elementary"], model: Model, embeds: Float32, tmp_path: Path
) -> None:
    model = short(model, LENGTH + 4)
    recipe = replace(RECIPES["fp32"], operators=operators)
    for name, length in (("chunk", CHUNK), ("token", 1)):
        shape, path = ChunkShape(length, LENGTH + 4), tmp_path / f"{name}.onnx"
        author_static_decoder(model.weights, model.spec, recipe, path, shape)
        assert {node.domain for node in ir.load(path).graph} == {""}
    decoder = opened(model, tmp_path)
    state = decoder.new_state()
    expected = reference_logits(model, embeds)
    assert relative_error(decoder.prefill(state, Rows(embeds))[0], expected[-1]) < 5 * FLOAT32
    state.rewind(10)
    ones = decoder.prefill(state, Rows(embeds[10:]), count=None)
    assert relative_error(ones, expected[10:]) < 5 * FLOAT32


def test_factors_in_all_folds_leave_the_logits_as_they_were(model: Model, embeds: Float32) -> None:
    """A fold is about the layers that read a norm's output, whatever is normalised beside."""
    folds = {}
    for index, place in enumerate(find_folds(model.spec)):
        random = np.random.default_rng(index).standard_normal(place.in_size)
        folds[place] = place.tie(np.exp(random).astype(np.float32), np.max)
    scaled = replace(model, weights=fold(model.weights, folds))
    expected = reference_logits(model, embeds)
    assert relative_error(reference_logits(scaled, embeds), expected) <= 1e-5


def test_folds_leave_out_what_a_gated_convolution_gives(tmp_path: Path) -> None:
    spec = decoder_spec(conv_layers=(1,), conv_kernel=3, qk_norm=True)
    model = in_memory(spec, tmp_path)
    test_factors_in_all_folds_leave_the_logits_as_they_were(model, random_embeds(128))
    producers = {place.producer for place in find_folds(spec)}
    assert "decoder.layers.0.attn.v_proj" in producers
    assert not [name for name in producers if name.startswith("decoder.layers.1.attn")]


def test_norms_are_read_back_out_of_a_graph(tmp_path: Path) -> None:
    model = in_memory(BLOCKS["Gemma 3"], tmp_path / "weights")
    path = tmp_path / "decoder.onnx"
    author_decoder(model.weights, model.spec, PLAIN_INT4, path)
    stored = OnnxTensors(path, model.spec, model.weights)
    norms = [name for name in model.weights if "norm" in name and name.startswith("decoder.")]
    assert len(norms) == 6 * LAYERS + 1
    for name in norms:
        shape = (24,) if ".attn." in name else (128,)
        assert np.array_equal(stored.read(name), model.weights.read(name, shape))


@pytest.mark.parametrize("version", ["decoder", "prefill"])
def test_integer_keys_and_values_meet_windows_and_soft_caps(version: str, tmp_path: Path) -> None:
    """``version``: tokens one by one, or a prompt at once."""
    model = in_memory(BLOCKS["Gemma 3"], tmp_path / "weights")
    spec, path = model.spec.decoder, tmp_path / "decoder.onnx"
    author_decoder(model.weights, model.spec, RECIPES["fp32"], path)
    embeds = random_embeds(128)
    floats = open_decoder(path, spec)
    expected = floats.step(embeds, 0)
    scales = {
        name: np.abs(value.numpy()[:, :, :LENGTH]).max(axis=2, keepdims=True) / np.float32(127)
        for name, value in floats.buffers.items()
    }
    rewrite(path, scales)
    shape = (1, spec.num_key_value_heads, CAPACITY, spec.cache_head_dim)
    buffers = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, 100, np.int8))
        for name in floats.buffers
    }
    decoder = Decoder(open_session(path), buffers)
    if version == "prefill":
        found = decoder.step(embeds, 0)
    else:
        found = np.concatenate([decoder.step(row[None], i) for i, row in enumerate(embeds)])
    assert 1e-4 < relative_error(found, expected) < INT8_CACHE


@pytest.mark.parametrize("table", ["fp32", "int4"])
def test_rows_of_the_table_are_scaled_by_every_engine_and_the_head_is_not(
    table: str, tmp_path: Path
) -> None:
    spec = BLOCKS["Gemma's blocks"]
    model = in_memory(spec, tmp_path / "weights")
    ids = [3, 96, 3, 0]
    with torch.no_grad():
        expected = load_reference(model).embed(ids, []).numpy()
    shape = (spec.decoder.vocab_size, spec.decoder.hidden_size)
    rows = model.weights.read("decoder.embed_tokens.weight", shape)[ids]
    assert relative_error(expected, rows * 11.3) < 1e-6
    path = tmp_path / "embeddings.onnx"
    author_embeddings(model.weights, spec, RECIPES[table], path)
    found = open_session(path).run(None, {"input_ids": np.array([ids])})[0][0]
    assert relative_error(found, expected) < (1e-7 if table == "fp32" else 1e-3)
    for name, length in (("chunk", CHUNK), ("token", 1)):
        author_static_decoder(
            model.weights, spec, RECIPES["fp32"], tmp_path / f"{name}.onnx",
            ChunkShape(length, spec.decoder.context_length),
        )  # fmt: skip
    assert np.array_equal(opened(model, tmp_path).embed(ids), expected)


@pytest.mark.parametrize(
    "off",
    [
        {"qk_norm": False},
        {"post_norms": False},
        {"attention_scale": None},
        {"attention_softcap": None},
        {"logit_softcap": None},
        {"sliding_layers": ()},
        {"sliding_window": 21},
        {"sliding_rope_theta": None},
        {"rope_scaling": 1.0},
    ],
    ids=lambda off: next(iter(off)),
)
def test_each_block_changes_the_logits(off: dict[str, Any], tmp_path: Path) -> None:
    """So that the tests above see each."""
    model = in_memory(BLOCKS["Gemma 3"], tmp_path)
    decoder = replace(model.spec.decoder, **off)
    without = replace(model, spec=replace(model.spec, decoder=decoder))
    embeds = random_embeds(128)
    found = reference_logits(without, embeds)
    assert relative_error(found, reference_logits(model, embeds)) > 50 * FLOAT32


# Measured: medians over positions of 0.013, as without these blocks (test_npu_graphs.py).
@pytest.mark.parametrize("name", ["query and key norms", "Gemma 3"])
def test_fixed_point_graphs_stay_near_the_references_logits(name: str, tmp_path: Path) -> None:
    fixture = fixture_named("mobilevlm_v2")
    spec = BLOCKS[name]
    decoder = replace(spec.decoder, vocab_size=fixture.model.spec.decoder.vocab_size)
    model = short(in_memory(replace(spec, decoder=decoder), tmp_path / "weights"), LENGTH + 4)
    fixed = fixed_decoder(fixture, model, FIXED, tmp_path)
    reference = load_reference(model)
    with torch.no_grad():
        embeds = reference.embed([5 + 3 * index for index in range(LENGTH)], [])
        expected = reference.logits(embeds).numpy()
    found = fixed.prefill(fixed.new_state(), Rows(embeds.numpy()), count=None)
    assert np.median(row_errors(found, expected)) < 0.03
