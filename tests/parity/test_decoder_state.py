"""Decoders whose state is more than keys and values at one-axis positions: graphs against the torch
reference, and sequences that go back or are reused against themselves, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT32, relative_error
from numpy.typing import NDArray
from test_graphs import decoder_spec, in_memory

from mobilevlm.bundle import EmbeddingTable
from mobilevlm.decoder_spec import DeltaSpec
from mobilevlm.errors import BundleError, MobileVLMError, SessionError
from mobilevlm.export.formats.gguf import gguf_jobs
from mobilevlm.export.formats.npu import npu_jobs
from mobilevlm.export.graph.author import author_decoder, author_embeddings
from mobilevlm.export.quantize.folding import find_folds
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.gguf.file import GgufFile
from mobilevlm.linear_groups import decoder_groups
from mobilevlm.plan import Plan
from mobilevlm.prompt import Rows
from mobilevlm.recipe import LinearFormat, Precision
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.runtime.engines.llama.gguf_check import check_decoder
from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder
from mobilevlm.runtime.engines.onnx.npu import NpuDecoder
from mobilevlm.runtime.engines.onnx.stored_segment import map_segment, write_segment
from mobilevlm.runtime.engines.state import KEPT_MARKS
from mobilevlm.spec import ModelSpec
from mobilevlm.state_buffers import KEPT_ROWS, KEPT_STATES

Array = NDArray[np.float32]
CONTEXT = 1024
CHUNK = 40

TWO_AXES = decoder_spec(context_length=CONTEXT, rope_sections=(3, 5), num_key_value_heads=2)
THREE_AXES = decoder_spec(context_length=CONTEXT, rope_sections=(4, 2, 2), rope_interleaved=True)
CONVOLUTION = decoder_spec(
    context_length=CONTEXT, num_hidden_layers=4, conv_layers=(0, 3), conv_kernel=3
)
BIASED = decoder_spec(
    context_length=CONTEXT, num_hidden_layers=3, conv_layers=(1,), conv_kernel=5, conv_bias=True
)
DEEP = decoder_spec(context_length=CONTEXT, rope_sections=(2, 3, 3), deep_layers=(0, 2))
DELTA = decoder_spec(
    context_length=CONTEXT,
    num_hidden_layers=4,
    rotary_dim=8,
    rope_sections=(2, 1, 1),
    rope_interleaved=True,
    qk_norm=True,
    attention_gate=True,
    delta=DeltaSpec((0, 1, 3), key_heads=2, value_heads=6, key_dim=8, value_dim=12, kernel=4),
)
UNGATED = decoder_spec(
    context_length=CONTEXT, delta=DeltaSpec((1,), 4, 4, key_dim=16, value_dim=8, kernel=2)
)
SPECS = {
    "two axes": TWO_AXES,
    "three axes in turns": THREE_AXES,
    "convolutions": CONVOLUTION,
    "convolution with biases": BIASED,
    "rows after layers": DEEP,
    "scaled embeddings": decoder_spec(context_length=CONTEXT, embed_scale=11.3),
    "rows after layers, rotated": DEEP,
    "convolutions, rotated": CONVOLUTION,
    "convolution with biases, rotated": BIASED,
    "gated delta layers": DELTA,
    "gated delta layers, rotated": DELTA,
    "one gated delta layer": UNGATED,
    "a sliding window": decoder_spec(
        context_length=CONTEXT, sliding_window=7, sliding_layers=(0, 2), sliding_rope_theta=500.0
    ),
}


@dataclass(frozen=True)
class Opened:
    spec: ModelSpec
    decoder: OnnxDecoder
    reference: ReferenceModel


@pytest.fixture(scope="module", params=SPECS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    layers = LinearFormat("fp32", scaling="rotation" if "rotated" in request.param else "none")
    return open_decoder(SPECS[request.param], tmp_path_factory.mktemp("decoder"), layers)


def open_decoder(
    spec: ModelSpec, folder: Path, layers: LinearFormat = RECIPES["fp32"].decoder
) -> Opened:
    model = in_memory(spec, folder)
    recipe = replace(RECIPES["fp32"], decoder=layers)
    author_decoder(model.weights, spec, recipe, folder / "decoder.onnx")
    author_embeddings(model.weights, spec, RECIPES["fp32"], folder / "table.onnx")
    rows = EmbeddingTable("", 0, "float32", spec.decoder.vocab_size, spec.decoder.hidden_size)
    plan = Plan(prefill_chunk=CHUNK, decoder_threads=1)
    decoder = OnnxDecoder(
        folder / "decoder.onnx", folder / "table.onnx_data", rows, spec.decoder, plan
    )
    return Opened(spec, decoder, load_reference(model))


def pieces_of(spec: ModelSpec, lengths: Sequence[int]) -> list[Rows]:
    """Text, and every second piece a grid of three columns with rows for layers."""
    random, decoder = np.random.default_rng(7), spec.decoder
    made, start = [], 0
    for index, length in enumerate(lengths):
        embeds = random.standard_normal((length, decoder.hidden_size), np.float32)
        deep = tuple(random.standard_normal(embeds.shape, np.float32) for _ in decoder.deep_layers)
        is_grid = index % 2 == 1
        positions = np.tile(start + np.arange(length), (decoder.position_axes, 1))
        if is_grid and decoder.rope_sections:
            positions[0] = start
            positions[1] = start + np.arange(length) // 3
            positions[2:] = start + np.arange(length) % 3
        start = int(positions.max()) + 1
        is_given = is_grid and decoder.rope_sections
        made.append(Rows(embeds, deep if is_grid else (), positions if is_given else None))
    return made


def expected_logits(opened: Opened, pieces: Sequence[Rows]) -> Array:
    """Logits ``(length, vocab_size)`` by the reference in one pass."""
    decoder, start, positions, deep = opened.spec.decoder, 0, [], []
    for piece in pieces:
        placed = piece.positions
        if placed is None:
            placed = np.tile(start + np.arange(len(piece)), (decoder.position_axes, 1))
        start = int(placed.max()) + 1
        positions.append(placed)
        deep.append(piece.deep or [np.zeros_like(piece.embeds)] * len(decoder.deep_layers))
    whole = torch.from_numpy(np.concatenate([piece.embeds for piece in pieces]))
    placed = np.concatenate(positions, axis=1)
    added = [torch.from_numpy(np.concatenate(rows))[None] for rows in zip(*deep, strict=True)]
    with torch.no_grad():
        at = torch.from_numpy(placed if decoder.rope_sections else placed[0])
        logits: Array = opened.reference.decoder(whole[None], at, deep=added)[0].numpy()
    return logits


LENGTHS = (20, 100, 30)
"""More than a chunk, and less."""


def test_logits_are_those_of_the_reference(opened: Opened) -> None:
    pieces = pieces_of(opened.spec, LENGTHS)
    state = opened.decoder.new_state()
    found = [opened.decoder.prefill(state, piece, count=None) for piece in pieces]
    expected = expected_logits(opened, pieces)
    assert relative_error(np.concatenate(found), expected) <= FLOAT32
    assert state.slots == sum(LENGTHS)


def test_steps_and_drafts_give_the_logits_of_the_reference(opened: Opened) -> None:
    before = pieces_of(opened.spec, LENGTHS)[:-1]
    tokens = [5, 7, 11, 13, 17, 19]
    rows = opened.decoder.embed(tokens)
    state = opened.decoder.new_state()
    for piece in before:
        opened.decoder.extend(state, piece)
    found = [opened.decoder.step(state, token).copy() for token in tokens[:3]]
    found += list(opened.decoder.answer(state, Rows(rows[3:])))
    expected = expected_logits(opened, [*before, Rows(rows)])[-len(tokens) :]
    assert relative_error(np.stack(found), expected) <= FLOAT32


def test_going_back_over_steps_is_exact_to_the_bit(opened: Opened) -> None:
    first, *_ = pieces_of(opened.spec, LENGTHS)
    state = opened.decoder.new_state()
    opened.decoder.prefill(state, Rows(first.embeds))
    tokens = list(range(1, 31))
    logits = [opened.decoder.step(state, token).copy() for token in tokens]
    positions = [state.position]
    for wanted in (29, 12, 3, 0):
        kept = state.reachable(len(first) + wanted) - len(first)
        assert kept == (0 if opened.spec.decoder.delta else wanted)
        state.rewind(len(first) + kept)
        opened.decoder.answer(
            state, Rows(opened.decoder.embed([9, 8, 7, 6]))
        )  # a draft that is wrong
        state.rewind(len(first) + kept)
        again = [opened.decoder.step(state, token).copy() for token in tokens[kept:]]
        assert np.array_equal(again, logits[kept:])
        positions.append(state.position)
    assert set(positions) == {state.slots}


def test_reused_pieces_give_the_bits_of_computed_ones(opened: Opened) -> None:
    pieces = pieces_of(opened.spec, (20, 100, 150, 30))
    decoder, state, segments, start = opened.decoder, opened.decoder.new_state(), [], 0
    *before, last = pieces
    for piece in before:
        decoder.extend(state, piece)
        segments.append(decoder.save(state, start))
        start = state.slots
    expected, position = decoder.prefill(state, Rows(last.embeds)), state.position

    state.rewind(0)
    decoder.extend(state, Rows(last.embeds))  # something else in the same places
    for segment in segments:
        state.rewind(0) if segment.start == 0 else None
        decoder.restore(state, segment)
        assert (state.slots, state.position) == (segment.end, segment.position)
    assert np.array_equal(decoder.prefill(state, Rows(last.embeds)), expected)
    assert state.position == position

    # The same sequence, gone back to each border.
    ends = np.cumsum([len(piece) for piece in before])
    for count in (2, 1, 0):
        end = int(ends[count - 1]) if count else 0
        assert state.reachable(end) == end
        state.rewind(end)
        for piece in before[count:]:
            decoder.extend(state, piece)
        assert np.array_equal(decoder.prefill(state, Rows(last.embeds)), expected)
        assert state.position == position


def test_a_state_after_a_segment_is_not_that_of_the_sequence_before_it(opened: Opened) -> None:
    first, second, third = pieces_of(opened.spec, (120, 110, 115))
    decoder, state, other = opened.decoder, opened.decoder.new_state(), opened.decoder.new_state()
    decoder.extend(other, Rows(first.embeds))
    segment = decoder.save(other, 0)
    expected = decoder.prefill(other, Rows(third.embeds))
    for piece in (second, third):
        decoder.extend(state, piece)
    state.rewind(0)
    decoder.restore(state, segment)
    assert np.array_equal(decoder.prefill(state, Rows(third.embeds)), expected)
    state.rewind(state.reachable(len(second)))
    assert state.slots in (0, len(second))  # of keys and values any slot, of convolutions none


def test_a_segment_in_a_file_gives_the_bits_of_the_one_that_was_written(
    opened: Opened, tmp_path: Path
) -> None:
    decoder, state, path = opened.decoder, opened.decoder.new_state(), tmp_path / "segment.bin"
    tokens, following = [3, 5, 7, 9, 11, 13, 15], decoder.embed([20, 21])
    decoder.extend(state, Rows(decoder.embed(tokens)))
    write_segment(path, decoder.save(state, 0))
    expected = decoder.prefill(state, Rows(following))
    other = decoder.new_state()
    decoder.restore(other, map_segment(path, opened.spec.decoder, len(tokens), np.float32))
    assert (other.slots, other.position) == (len(tokens), len(tokens))
    assert np.array_equal(decoder.prefill(other, Rows(following)), expected)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BundleError, match=f"7 tokens of this model take {path.stat().st_size + 4}"):
        map_segment(path, opened.spec.decoder, len(tokens), np.float32)


@pytest.mark.parametrize("precision", ["int8", "q4"])
def test_products_around_a_convolution_are_quantized_too(
    precision: Precision, tmp_path: Path
) -> None:
    model, layers = in_memory(CONVOLUTION, tmp_path), LinearFormat(precision)
    plain = replace(RECIPES["fp32"], decoder=layers, lm_head=layers)
    written = author_decoder(model.weights, CONVOLUTION, plain, tmp_path / "decoder.onnx")
    names = {group.name for group in decoder_groups(CONVOLUTION.decoder)}
    assert {"decoder.layers.0.short_conv.in_proj", "decoder.layers.3.short_conv.out_proj"} <= names
    assert {name.split(",")[0] for name in written.errors} == names
    assert not any("conv.weight" in name for name in written.errors)
    folds = [fold.producer for fold in find_folds(CONVOLUTION)]
    assert "decoder.layers.0.input_norm" in folds
    assert "decoder.layers.0.attn.v_proj" not in folds


def test_text_counts_on_from_the_largest_position(tmp_path: Path) -> None:
    opened = open_decoder(TWO_AXES, tmp_path)
    text, image, _ = pieces_of(TWO_AXES, (4, 12, 1))
    state = opened.decoder.new_state()
    opened.decoder.extend(state, Rows(text.embeds))
    assert (state.slots, state.position) == (4, 4)
    opened.decoder.extend(state, Rows(image.embeds, positions=image.positions))
    assert (state.slots, state.position) == (16, 8)  # four rows of three
    opened.decoder.step(state, 5)
    assert (state.slots, state.position) == (17, 9)
    state.rewind(10)
    assert (state.slots, state.position) == (10, 6)


def test_a_slot_whose_convolution_state_is_gone_is_refused(tmp_path: Path) -> None:
    opened = open_decoder(CONVOLUTION, tmp_path)
    decoder, state = opened.decoder, opened.decoder.new_state()
    for piece in pieces_of(CONVOLUTION, (50, 150, 40)):
        decoder.extend(state, Rows(piece.embeds))
    reachable = sorted({state.reachable(slots) for slots in range(241)})
    window = 240 - KEPT_ROWS
    assert reachable == [0, 50, *range(window, 241)]
    with pytest.raises(SessionError, match="no longer has its state after 100: go back to 50 and"):
        state.rewind(100)
    assert state.slots == 240


def test_recurrent_states_go_back_to_the_last_ends_of_pieces_only(tmp_path: Path) -> None:
    opened = open_decoder(DELTA, tmp_path)
    decoder, state = opened.decoder, opened.decoder.new_state()
    for piece in pieces_of(DELTA, [5] * (KEPT_STATES + 3)):
        decoder.extend(state, Rows(piece.embeds))
    decoder.step(state, 5)
    length = 5 * (KEPT_STATES + 3) + 1
    found = sorted({state.reachable(slots) for slots in range(length + 1)})
    assert found == [0, *range(5 * 4, length, 5), length]
    with pytest.raises(SessionError, match="no longer has its state after 22: go back to 20 and"):
        state.rewind(22)
    assert state.slots == length


def test_marks_that_are_too_many_are_forgotten_oldest_first(tmp_path: Path) -> None:
    opened = open_decoder(CONVOLUTION, tmp_path)
    decoder, state = opened.decoder, opened.decoder.new_state()
    for piece in pieces_of(CONVOLUTION, [5] * (KEPT_MARKS + 10) + [200]):
        decoder.extend(state, Rows(piece.embeds))
    found = {state.reachable(slots) for slots in range(5 * (KEPT_MARKS + 10) + 1)}
    assert len(found) == KEPT_MARKS  # the start and all marks but that of now
    assert min(found - {0}) == 5 * 12


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (TWO_AXES, "positions of several axes"),
        (CONVOLUTION, "short convolutions"),
        (decoder_spec(deep_layers=(1,)), "rows added after some layers"),
        (UNGATED, "gated delta layers"),
        (decoder_spec(attention_gate=True), "gates behind attention"),
    ],
    ids=["axes", "convolution", "deep", "delta", "gate"],
)
def test_engines_and_formats_without_these_parts_refuse_them_by_name(
    spec: ModelSpec, part: str, tmp_path: Path
) -> None:
    model, header = in_memory(spec, tmp_path), GgufFile(tmp_path, 3, {}, {}, {}, (), 0)
    with pytest.raises(MobileVLMError, match=f"no graphs for NPUs of a decoder with {part}"):
        npu_jobs(model, RECIPES["fp32"])
    with pytest.raises(MobileVLMError, match="the GGUF writer knows no architecture"):
        gguf_jobs(model, RECIPES["fp32"])
    # llama.cpp runs all three: this file is refused for what it lacks.
    with pytest.raises(BundleError, match="damaged or of another model"):
        check_decoder(header, spec.decoder)
    rows, path = EmbeddingTable("", 0, "float32", 1, 1), tmp_path / "model.safetensors"
    with pytest.raises(BundleError, match=f"the npu engine runs no decoder with {part}"):
        NpuDecoder(path, path, path, rows, spec.decoder, 1)
