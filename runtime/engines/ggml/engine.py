"""The decoder stage in ggml, from a GGUF file: a graph of our own on the kernels of llama.cpp.

It runs what llama.cpp has no architecture for, and everything else as a second implementation.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.split import refuse_split
from mobilevlm.prompt import Rows
from mobilevlm.runtime.engines import (
    DecoderState,
    ExpertChoices,
    Float32,
    Segment,
    in_chunks,
    no_experts,
    refuse_parts,
    still_open,
)
from mobilevlm.runtime.engines.ggml.graph import DecoderGraph
from mobilevlm.runtime.engines.ggml.layers import GraphShape, KeyValues, Observe
from mobilevlm.runtime.engines.ggml.native import MappedTensors, Processor
from mobilevlm.runtime.engines.ggml.residency import ExpertResidency
from mobilevlm.runtime.engines.llama.gguf_check import check_decoder
from mobilevlm.runtime.engines.llama.gguf_decoder import GgufDecoder
from mobilevlm.runtime.engines.state import SlotState

_VISIBLE_STEP = 256
"""Attention reads the sequence rounded up to this, so that a graph serves many steps."""


class GgmlState(SlotState):
    """Keys and values of one sequence, and the graphs that write them: one for single tokens, one
    for the last length of prompt."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: MappedTensors,
        kind: str,
        threads: int,
        observe: Observe | None = None,
    ) -> None:
        super().__init__()
        self._observe = observe
        self._spec = spec
        self._weights = weights
        self._cache = KeyValues(spec, kind)
        self._processor = Processor(threads)
        self._graphs: dict[bool, DecoderGraph] = {}

    def append(self, rows: Rows, outputs: int) -> Float32:
        """Appends rows; logits of the last positions ``(outputs,
        vocab_size)``, valid until the next call. After a failure the sequence is as it was."""
        count, context = len(rows), self._spec.context_length
        if self.slots + count > context:
            raise MobileVLMError(
                f"ggml failed after {self.slots} positions: the context is full ({context})"
            )
        visible = -(-(self.slots + count) // _VISIBLE_STEP) * _VISIBLE_STEP
        shape = GraphShape(count, min(visible, context), outputs)
        logits = self._graph(shape).run(self._processor, rows, self.slots)
        self.advance(count)
        return logits

    def save(self, start: int) -> NDArray[np.uint8]:
        """Keys and values of the positions from ``start`` on, see ``KeyValues.rows``."""
        data = self._cache.rows[:, start : self.slots].copy()
        data.flags.writeable = False
        return data

    def restore(self, segment: Segment) -> None:
        """Puts saved keys and values where they were; the sequence ends with them."""
        self._cache.rows[:, segment.start : segment.end] = segment.data
        self.resume(segment.end)

    def _graph(self, shape: GraphShape) -> DecoderGraph:
        single = shape.length == 1
        if single in self._graphs and self._graphs[single].shape != shape:
            del self._graphs[single]  # its memory goes before the next one's comes
        if single not in self._graphs:
            self._graphs[single] = DecoderGraph(
                self._spec, self._weights.pointers, self._cache, shape, self._observe
            )
        return self._graphs[single]


class GgmlDecoder(GgufDecoder):
    """See :class:`mobilevlm.runtime.engines.DecoderEngine`. Weights stay in the mapped file."""

    def __init__(
        self, path: Path, spec: DecoderSpec, threads: int, max_resident: int | None = None
    ) -> None:
        """``max_resident``: bytes of experts that may be resident; none: as the system likes."""
        refuse_parts(spec, "ggml")
        header = read_gguf(path)
        check_decoder(header, spec)
        super().__init__(header, spec, threads)
        if max_resident is not None:
            refuse_split(header, "--max-resident")
        weights = MappedTensors(header)
        self._weights: MappedTensors | None = weights
        self._residency: ExpertResidency | None = None
        if max_resident is not None:
            self._residency = ExpertResidency(header, weights.contents[path], spec, max_resident)

    @property
    def brought_in_bytes(self) -> int | None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        return self._residency.brought_in if self._residency else None

    def new_state(self) -> GgmlState:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        return self._observed_state(self._residency.use if self._residency else None)

    def _observed_state(self, observe: Observe | None) -> GgmlState:
        weights = still_open(self._weights)
        return GgmlState(
            self._spec, weights, "F32" if self._exact else "F16", self._threads, observe
        )

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. What the graph itself chose."""
        if self._spec.experts is None:
            raise no_experts()
        found: dict[int, list[NDArray[np.int32]]] = {}

        def note(layer: int, chosen: NDArray[np.int32]) -> None:
            found.setdefault(layer, []).append(chosen.copy())

        self.prefill(self._observed_state(note), Rows(embeds), count=None)
        return {layer: np.concatenate(chunks) for layer, chunks in found.items()}

    def _append(self, state: DecoderState, rows: Rows, count: int | None) -> Float32:
        """Append rows; return the logits of the last ``count`` (none: of all)."""
        return in_chunks(partial(self._append_chunk, state), rows, count)

    def _append_chunk(self, state: DecoderState, rows: Rows, count: int) -> Float32:
        """Append a chunk; logits of its last ``count`` positions. A graph makes one at least."""
        assert isinstance(state, GgmlState)
        still_open(self._weights)
        still_open(self._rows).check()
        return state.append(rows, max(count, 1))[:count].copy()

    def step(self, state: DecoderState, token: int) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, GgmlState)
        result: Float32 = state.append(Rows(self.embed([token])), 1)[0]
        return result

    def save(self, state: DecoderState, start: int) -> Segment:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, GgmlState)
        return Segment(start, state.slots, state.save(start))

    def restore(self, state: DecoderState, segment: Segment) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, GgmlState)
        state.restore(segment)

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self._weights = self._rows = None
