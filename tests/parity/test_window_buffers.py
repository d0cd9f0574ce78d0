"""Sliding layers keep the rows of their window, in buffers that do not grow: long sequences against
the torch reference, and sequences that go back or are reused against themselves, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT32, relative_error
from numpy.typing import NDArray
from test_decoder_state import Opened, open_decoder
from test_graphs import decoder_spec

from mobilevlm.errors import SessionError
from mobilevlm.prompt import Rows
from mobilevlm.runtime.engines.onnx.onnx_state import OnnxState
from mobilevlm.runtime.engines.onnx.stored_segment import map_segment, write_segment
from mobilevlm.state_buffers import KEPT_ROWS, slot_buffers, window_rows

Array = NDArray[np.float32]
CONTEXT, WINDOW, LENGTH = 4096, 24, 2300
SPECS = {
    "some layers": decoder_spec(
        context_length=CONTEXT,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        sliding_layers=(0, 2),
        sliding_rope_theta=500.0,
        rope_scaling=8.0,
        num_key_value_heads=2,
    ),
    "all layers": decoder_spec(
        context_length=CONTEXT, sliding_window=WINDOW, sliding_layers=(0, 1), rotary_dim=6
    ),
}


@pytest.fixture(scope="module", params=SPECS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_decoder(SPECS[request.param], tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def embeds(opened: Opened) -> Array:
    size = opened.spec.decoder.hidden_size
    return np.random.default_rng(3).standard_normal((LENGTH, size), np.float32)


def expected_logits(opened: Opened, embeds: Array) -> Array:
    with torch.no_grad():
        found: Array = opened.reference.logits(torch.from_numpy(embeds)).numpy()
    return found


def buffer_sizes(state: OnnxState) -> dict[str, int]:
    return {name: buffer.shape[2] for name, buffer in state.buffers.items()}


def test_a_sequence_longer_than_the_buffers_gives_the_logits_of_the_reference(
    opened: Opened, embeds: Array
) -> None:
    decoder, state = opened.decoder, opened.decoder.new_state()
    before = buffer_sizes(state)
    spec = opened.spec.decoder
    sliding = {part.name for part in slot_buffers(spec) if part.kind == "sliding"}
    assert {before[name] for name in sliding} == {window_rows(spec)}
    assert window_rows(spec) < LENGTH / 2
    found = [decoder.prefill(state, Rows(embeds[:2000]), count=None)]
    found.append(decoder.answer(state, Rows(embeds[2000:])))
    tokens = [5, 7, 11, 13]
    found.append(np.stack([decoder.step(state, token).copy() for token in tokens]))
    assert buffer_sizes(state) == before
    whole = np.concatenate([embeds, decoder.embed(tokens)])
    assert relative_error(np.concatenate(found), expected_logits(opened, whole)) <= FLOAT32


@pytest.mark.parametrize("length", [890, 1500, 2200])
@pytest.mark.parametrize("back", [1, WINDOW // 2, WINDOW, KEPT_ROWS])
def test_going_back_into_a_window_gives_the_bits_of_a_fresh_sequence(
    opened: Opened, embeds: Array, length: int, back: int
) -> None:
    decoder, other = opened.decoder, embeds[::-1][:50].copy()
    state, fresh = decoder.new_state(), decoder.new_state()
    decoder.extend(state, Rows(embeds[: length - back]))
    decoder.extend(state, Rows(embeds[length - back : length]))
    assert state.reachable(length - back) == length - back
    state.rewind(length - back)
    found = decoder.prefill(state, Rows(other), count=None)
    decoder.extend(fresh, Rows(embeds[: length - back]))
    assert np.array_equal(found, decoder.prefill(fresh, Rows(other), count=None))
    whole = np.concatenate([embeds[: length - back], other])
    expected = expected_logits(opened, whole)[-len(other) :]
    assert relative_error(found, expected) <= FLOAT32


def test_a_window_that_is_gone_is_not_gone_back_to(opened: Opened, embeds: Array) -> None:
    decoder, state = opened.decoder, opened.decoder.new_state()
    decoder.extend(state, Rows(embeds))
    assert state.reachable(1000) == 0
    with pytest.raises(SessionError, match="no longer has its state after 1000: go back to 0"):
        state.rewind(1000)
    state.rewind(0)
    first = decoder.prefill(state, Rows(embeds[:30]), count=None)
    assert relative_error(first, expected_logits(opened, embeds[:30])) <= FLOAT32


def test_reused_pieces_of_a_long_sequence_give_the_bits_of_computed_ones(
    opened: Opened, embeds: Array, tmp_path: Path
) -> None:
    decoder, state, segments, start = opened.decoder, opened.decoder.new_state(), [], 0
    for end in (400, 420, 1600, 1610, 2200):
        decoder.extend(state, Rows(embeds[start:end]))
        segments.append(decoder.save(state, start))
        start = end
    expected = decoder.prefill(state, Rows(embeds[2200:]), count=None)
    other = decoder.new_state()
    decoder.extend(other, Rows(embeds[::-1].copy()))  # something else in the same places
    other.rewind(0)
    for segment in segments:
        decoder.restore(other, segment)
    assert np.array_equal(decoder.prefill(other, Rows(embeds[2200:]), count=None), expected)
    assert other.reachable(2200 - WINDOW) == 2200 - WINDOW

    path, fresh = tmp_path / "segment.bin", decoder.new_state()
    decoder.extend(fresh, Rows(embeds[:1600]))
    write_segment(path, decoder.save(fresh, 0))
    after = decoder.prefill(fresh, Rows(embeds[1600:1640]))
    other.rewind(0)
    decoder.restore(other, map_segment(path, opened.spec.decoder, 1600, np.float32))
    assert np.array_equal(decoder.prefill(other, Rows(embeds[1600:1640])), after)
