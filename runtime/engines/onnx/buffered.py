"""What decoders in ONNX Runtime share: embedding rows in a mapped file, keys and values in
arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.bundle import EmbeddingTable
from mobilevlm.runtime.engines import DecoderState, Float32, Segment, still_open
from mobilevlm.runtime.engines.onnx.mapped_pages import check_whole, small_pages
from mobilevlm.runtime.engines.state import SlotState
from mobilevlm.spec import DecoderSpec


class BufferedState(SlotState):
    """Keys and values ``(1, num_key_value_heads, capacity, head_dim)`` by name."""

    def __init__(self, buffers: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self.buffers = buffers


class BufferedDecoder:
    """The part of :class:`mobilevlm.runtime.engines.DecoderEngine` that needs no session. States
    are :class:`BufferedState`."""

    def __init__(self, table: Path, embeddings: EmbeddingTable, spec: DecoderSpec) -> None:
        mapped = map_table(table, embeddings)
        self._mapped: np.memmap[Any, Any] | None = mapped
        self._table: NDArray[Any] | None = mapped.view(np.ndarray)  # indexing in a tenth of time
        self._embed_scale = spec.embed_scale

    @property
    def brought_in_bytes(self) -> int | None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. Weights come and go as a whole."""
        return None

    def embed(self, ids: Sequence[int]) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        table = still_open(self._table)
        check_whole(still_open(self._mapped))
        rows: Float32 = table[np.asarray(ids, np.int64)].astype(np.float32)
        return rows if self._embed_scale == 1 else rows * np.float32(self._embed_scale)

    def save(self, state: DecoderState, start: int) -> Segment:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. ``data``:
        ``(2 · layers, num_key_value_heads, positions, head_dim)``, keys before values, in the
        buffers' type."""
        assert isinstance(state, BufferedState)
        data = np.stack([buffer[0, :, start : state.slots] for buffer in state.buffers.values()])
        data.flags.writeable = False
        return Segment(start, state.slots, data)

    def restore(self, state: DecoderState, segment: Segment) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, BufferedState)
        if isinstance(segment.data, np.memmap):  # the bundle's system prompt
            check_whole(segment.data)
        for buffer, part in zip(state.buffers.values(), segment.data, strict=True):
            buffer[0, :, segment.start : segment.end] = part
        state.resume(segment.end)


def map_table(path: Path, embeddings: EmbeddingTable) -> np.memmap[Any, Any]:
    """The embedding rows ``(rows, columns)`` in a file, mapped."""
    mapped = np.memmap(
        path,
        dtype=embeddings.dtype,
        mode="r",
        offset=embeddings.offset,
        shape=(embeddings.rows, embeddings.columns),
    )
    small_pages(mapped)
    return mapped
