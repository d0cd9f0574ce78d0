"""ONNX graphs with fixed shapes, for NPUs: a chunk of the prompt at a time, then token by token.

A bundle has them in fixed point of standard operators (export/fixed_shapes/decoder.py), or in float
of those that mobile accelerators take (export/fixed_shapes/float_decoder.py). What depends on a
position comes from here: rotary tables, the mask, and a window of earlier keys and values, 8-bit
integers or floats, to which each run's own are added. Without an NPU ONNX Runtime runs them on the
CPU, each operator of fixed point in float32 between two roundings, as an NPU would but slowly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mobilevlm.bundle import EmbeddingTable
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.prompt import Rows
from mobilevlm.rotary import rotary_tables
from mobilevlm.runtime.engines import (
    DecoderState,
    ExpertChoices,
    Float32,
    refuse_parts,
    still_open,
)
from mobilevlm.runtime.engines.contracts import check_static_decoder
from mobilevlm.runtime.engines.onnx.buffered import BufferedDecoder, BufferedState
from mobilevlm.runtime.engines.onnx.engine import open_session
from mobilevlm.runtime.engines.onnx.mapped_weights import Session

MASKED = -1e4
"""Added to logits of attention that do not count; the graph stops where its scales do."""


_PAST = "past_key_values."
FIXED_POINT = {"session.disable_quant_qdq": "1"}
"""Settings of a session that runs each operator of a fixed-point graph in float32, as on its own:
ONNX Runtime's integer products would saturate (8-bit weights on AVX2), or round once more."""


def signed_tables(spec: DecoderSpec, sliding: bool = False) -> tuple[Float32, Float32]:
    """Cosine and sine ``(context_length, rotary_channels)``, the sine of the first half
    negative. ``sliding``: of the sliding layers' own base."""
    cos, sin = rotary_tables(spec, sliding)
    return np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)


def causal_mask(length: int, window: int, filled: int, near: int | None = None) -> Float32:
    """``(1, 1, length, window + length)``: each position of a chunk sees the ``filled`` first ones
    of the window, and the chunk up to itself. ``near``: of these only so many, the last ones."""
    mask = np.full((length, window + length), MASKED, np.float32)
    mask[:, :filled] = 0
    mask[:, window:][np.tri(length, dtype=bool)] = 0
    if near is not None:
        query = filled + np.arange(length)[:, None]
        key = np.concatenate([np.arange(window), filled + np.arange(length)])
        mask[key <= query - near] = MASKED
    return mask[None, None]


def masks_of(spec: DecoderSpec, length: int, window: int, filled: int) -> dict[str, Float32]:
    """Masks by the names of a graph's inputs, see :func:`causal_mask`."""
    masks = {"attention_mask": causal_mask(length, window, filled)}
    if spec.sliding_layers:
        masks["sliding_mask"] = causal_mask(length, window, filled, spec.sliding_window)
    return masks


def tables_of(spec: DecoderSpec) -> dict[str, Float32]:
    """Tables of all positions by the names of a graph's inputs, see :func:`signed_tables`."""
    names = ("rotary_cos", "rotary_sin")
    tables = dict(zip(names, signed_tables(spec), strict=True))
    if spec.sliding_layers and spec.sliding_rope_theta is not None:
        names = ("sliding_cos", "sliding_sin")
        tables |= zip(names, signed_tables(spec, sliding=True), strict=True)
    return tables


class NpuState(BufferedState):
    """Keys and values ``(1, num_key_value_heads, window, head_dim)`` per layer, as the graphs take
    them: 8-bit integers, or float32 where nothing is quantized."""

    def __init__(self, session: ort.InferenceSession) -> None:
        super().__init__(
            {
                value.name.removeprefix(_PAST): np.zeros(
                    value.shape, np.uint8 if value.type == "tensor(uint8)" else np.float32
                )
                for value in session.get_inputs()
                if value.name.startswith(_PAST)
            }
        )


class NpuDecoder(BufferedDecoder):
    """The decoder stage: a graph for chunks, one for single tokens; embedding rows are read from a
    mapped file.

    Raises:
        BundleError: the graphs do not fit the spec.
    """

    def __init__(
        self,
        chunks: Path,
        tokens: Path,
        table: Path,
        embeddings: EmbeddingTable,
        spec: DecoderSpec,
        threads: int,
    ) -> None:
        super().__init__(table, embeddings, spec)
        refuse_parts(spec, "npu")
        self._chunks: Session | None = open_session(chunks, threads, entries=FIXED_POINT)
        self._tokens = open_session(tokens, threads, entries=FIXED_POINT)
        self.chunk, self.window = _shape(self._chunks)
        if self.window != spec.context_length or not 0 < self.chunk <= self.window:
            raise BundleError(
                f"{chunks}: a graph for {self.chunk} positions behind {self.window}, the context "
                f"has {spec.context_length}: export the bundle again"
            )
        check_static_decoder(self._chunks, spec, self.chunk, self.window)
        check_static_decoder(self._tokens, spec, 1, self.window)
        shapes = {value.name: value.type for value in self._chunks.get_inputs()}
        self._by_row = shapes["logits_position"] == "tensor(float)"
        self._spec, self._tables = spec, tables_of(spec)

    def new_state(self) -> NpuState:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        return NpuState(still_open(self._chunks))

    def prefill(self, state: DecoderState, rows: Rows, count: int | None = 1) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. A run has the logits of one
        position, so several take a run each."""
        assert isinstance(state, NpuState) and rows.positions is None and not rows.deep
        length = len(rows)
        single = length if count is None else count
        chunked = length - single if single != 1 else length
        found = [
            self._append(state, rows.embeds[start : min(start + self.chunk, chunked)])
            for start in range(0, chunked, self.chunk)
        ][-1:]
        found += [self._append(state, row[None]) for row in rows.embeds[chunked:]]
        return np.concatenate(found)[-single:]

    def extend(self, state: DecoderState, rows: Rows) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self.prefill(state, rows)

    def answer(self, state: DecoderState, rows: Rows, count: int | None = None) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. Token by token, as :meth:`step`."""
        return self.prefill(state, rows, count)

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. These graphs compute all experts
        and keep the choice to themselves."""
        raise MobileVLMError(
            "graphs for NPUs do not say what their routers decide: use --engine onnx"
        )

    def step(self, state: DecoderState, token: int) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, NpuState)
        logits: Float32 = self._append(state, self.embed([token]))[0]
        return logits

    def _append(self, state: NpuState, embeds: Float32) -> Float32:
        """Appends at most a chunk; logits of its last position ``(1, vocab_size)``. What a chunk
        lacks is filled up behind, where no position sees it."""
        start, count = state.slots, len(embeds)
        session, length = still_open(self._chunks), self.chunk
        if count == 1:
            session, length = self._tokens, 1
        positions = np.minimum(np.arange(start, start + length), self._spec.context_length - 1)
        rows = np.concatenate([embeds, np.repeat(embeds[-1:], length - count, axis=0)])
        outputs = [f"present.{name}" for name in state.buffers]
        logits, *presents = session.run(
            ["logits", *outputs],
            {
                "inputs_embeds": rows[None],
                **masks_of(self._spec, length, self.window, start),
                **{name: table[None, positions, None] for name, table in self._tables.items()},
                "logits_position": self._position(count - 1, length),
                **{f"{_PAST}{name}": part for name, part in state.buffers.items()},
            },
        )
        for buffer, present in zip(state.buffers.values(), presents, strict=True):
            buffer[:, :, start : start + count] = present[:, :, :count]
        state.advance(count)
        result: Float32 = logits[0]
        return result

    def _position(self, index: int, length: int) -> NDArray[Any]:
        """Whose logits are wanted: an index, or a row with a 1 there ``(1, 1, length)``."""
        if self._by_row:
            return np.eye(1, length, index, np.float32)[None]
        return np.array([index], np.int32)

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self._chunks = self._table = self._mapped = None


def _shape(session: Session) -> tuple[int, int]:
    """Return the positions of a run, and of the window.

    Raises:
        BundleError: the graph has no such inputs, or of sizes that vary.
    """
    shapes = {value.name: value.shape for value in session.get_inputs()}
    found = shapes.get("inputs_embeds", [])[1:2] + shapes.get(f"{_PAST}0.key", [])[2:3]
    if len(found) != 2 or not all(isinstance(size, int) for size in found):
        raise BundleError(f"{session.path}: no decoder of fixed shapes: export the bundle again")
    return found[0], found[1]
