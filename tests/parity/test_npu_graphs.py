"""Decoder graphs of fixed shapes, driven by the runtime: in float32 the official logits, in fixed
point what rounding leaves of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import (
    FAMILY_FIXTURES,
    FIXTURES,
    FLOAT32,
    HUB_FIXTURES,
    MOE_FIXTURES,
    QWEN_FIXTURES,
    Fixture,
    fixture_named,
    relative_error,
)
from numpy.typing import NDArray

from mobilevlm.bundle import EmbeddingTable
from mobilevlm.console.progress import ignore
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.fixed_shapes.decoder import author_qdq_decoder
from mobilevlm.export.formats.npu import npu_jobs
from mobilevlm.export.graph.author import ChunkShape, author_embeddings, author_static_decoder
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.model import Model
from mobilevlm.prompt import Rows
from mobilevlm.recipe import Recipe
from mobilevlm.runtime.engines.onnx.npu import NpuDecoder

CHUNK = 24
FIXED = RECIPES["a16w8"].with_weight_bits(8, auto_only=True)


def short(model: Model, length: int) -> Model:
    """With no more context than a test needs."""
    decoder = replace(model.spec.decoder, context_length=length)
    return replace(model, spec=replace(model.spec, decoder=decoder))


def opened(model: Model, folder: Path) -> NpuDecoder:
    """On ``chunk.onnx`` and ``token.onnx``."""
    spec, table = model.spec.decoder, folder / "table.onnx"
    author_embeddings(model.weights, model.spec, RECIPES["fp32"], table)
    rows = EmbeddingTable("", 0, "float32", spec.vocab_size, spec.hidden_size)
    data = table.with_name("table.onnx_data")
    return NpuDecoder(folder / "chunk.onnx", folder / "token.onnx", data, rows, spec, 2)


def float_decoder(model: Model, folder: Path) -> NpuDecoder:
    recipe = replace(RECIPES["fp32"], experts="dense")
    for name, length in (("chunk", CHUNK), ("token", 1)):
        shape = ChunkShape(length, model.spec.decoder.context_length)
        author_static_decoder(model.weights, model.spec, recipe, folder / f"{name}.onnx", shape)
    return opened(model, folder)


def fixed_decoder(fixture: Fixture, model: Model, recipe: Recipe, folder: Path) -> NpuDecoder:
    samples = [Sample("Describe the picture.", "It is small.", (fixture.image,))]
    paths = [folder / "chunk.onnx", folder / "token.onnx"]
    shapes = [ChunkShape(length, model.spec.decoder.context_length) for length in (CHUNK, 1)]
    author_qdq_decoder(model, samples, recipe, paths, shapes, folder / "shared", ignore)
    return opened(model, folder)


REFUSED = {
    "blip2": "learned positions",
    "blip2_t5": "an encoder",
    "instructblip": "a Q-Former",
    "lfm2_vl": "short convolutions",
    **dict.fromkeys([*QWEN_FIXTURES, "qwen3_5"], "images prepared as 'dynamic_image'"),
    "gemma3": "images whose rows see each other",
    "gemma4": "images prepared as 'dynamic_image'",
}
WITH_GRAPHS = [
    name
    for name in (*FIXTURES, *MOE_FIXTURES, *FAMILY_FIXTURES, *HUB_FIXTURES)
    if name not in REFUSED
]


@pytest.mark.parametrize("name", REFUSED)
def test_parts_without_graphs_of_fixed_shapes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(MobileVLMError, match=f"{REFUSED[name]} yet: use --format onnx"):
        npu_jobs(fixture_named(name).model, FIXED)


@pytest.mark.parametrize("name", WITH_GRAPHS)
def test_float_graphs_of_fixed_shapes_give_the_official_logits(name: str, tmp_path: Path) -> None:
    fixture = fixture_named(name)
    embeds = fixture.arrays["inputs_embeds"][0]
    model = short(fixture.model, len(embeds) + 4)
    decoder = float_decoder(model, tmp_path)
    state = decoder.new_state()
    found = decoder.prefill(state, Rows(embeds))[0]
    assert state.slots == len(embeds)
    assert relative_error(found, fixture.logits[-1]) < 5 * FLOAT32
    # Chunk by chunk and one by one, with a place where the sequence goes back.
    half = len(embeds) // 2
    state.rewind(half)
    ones = decoder.prefill(state, Rows(embeds[half:]), count=None)
    assert relative_error(ones, fixture.logits[half:]) < 5 * FLOAT32
    state.rewind(0)
    last = decoder.prefill(state, Rows(embeds), count=3)  # the others in chunks
    assert last.shape == (3, model.spec.decoder.vocab_size)
    assert relative_error(last, fixture.logits[-3:]) < 5 * FLOAT32


# Measured with random weights, which pass on each rounding in full: medians over positions of 0.014
# and 0.08 (another expert where two are alike), 0.001 and 0.01.
@pytest.mark.parametrize(("name", "limit"), [("mobilevlm_v2", 0.03), ("moe_llava_stablelm", 0.15)])
def test_fixed_point_graphs_stay_near_the_official_logits(
    name: str, limit: float, tmp_path: Path
) -> None:
    fixture = fixture_named(name)
    embeds = fixture.arrays["inputs_embeds"][0]
    model = short(fixture.model, len(embeds) + 4)
    decoder = fixed_decoder(fixture, model, FIXED, tmp_path)
    state = decoder.new_state()
    ones = decoder.prefill(state, Rows(embeds), count=None)
    assert np.median(row_errors(ones, fixture.logits)) < limit
    # The graphs have the same scales: one goes on where the other was.
    half = len(embeds) // 2
    before = {key: buffer.copy() for key, buffer in state.buffers.items()}
    state.rewind(half)
    found = decoder.prefill(state, Rows(embeds[half:]))
    assert row_errors(found, ones[-1:])[0] < limit
    for key, buffer in state.buffers.items():
        off = np.abs(buffer.astype(int) - before[key])
        assert buffer.dtype == np.uint8 and np.median(off) <= 1


def row_errors(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """Relative error of each row."""
    errors: NDArray[np.float32] = np.linalg.norm(found - expected, axis=1)
    norms: NDArray[np.float32] = np.linalg.norm(expected, axis=1)
    return errors / norms


def test_fixed_point_graphs_are_standard_static_and_share_their_weights(
    mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    model = short(mobilevlm_v2.model, 200)
    fixed_decoder(mobilevlm_v2, model, FIXED, tmp_path)
    places = []
    for name in ("chunk", "token"):
        graph = ir.load(tmp_path / f"{name}.onnx").graph
        assert {node.domain for node in graph} == {""}
        assert all(value.shape.is_static() for value in (*graph.inputs, *graph.outputs))
        tensors = [value.const_value for value in graph.initializers.values()]
        large = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
        assert {tensor.location for tensor in large} == {"shared"}
        places.append({tensor.name: (tensor.offset, tensor.length) for tensor in large})
        states = [value for value in graph.outputs if value.name.startswith("present")]
        assert {value.dtype for value in states} == {ir.DataType.UINT8}
    assert places[0] == places[1]


def test_a_bundle_for_npus_is_the_same_bytes_each_time(
    mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    made = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        fixed_decoder(mobilevlm_v2, short(mobilevlm_v2.model, 200), FIXED, folder)
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1]
    assert "shared" in made[0] and not [name for name in made[0] if name.startswith(".")]
