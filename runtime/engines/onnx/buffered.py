"""The common part of decoders in ONNX Runtime: embedding rows in a mapped file, keys and values in
arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.bundle import EmbeddingTable
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.engines import DecoderState, Float32, Segment, still_open
from mobilevlm.runtime.engines.onnx.mapped_pages import check_whole, small_pages
from mobilevlm.runtime.engines.state import (
    ConvolutionState,
    NextPositions,
    RecurrentState,
    SlotState,
    WindowBuffers,
)


class BufferedState(SlotState):
    """Keys and values ``(1, num_key_value_heads, capacity, head_dim)`` by name, and what else a
    decoder keeps."""

    def __init__(
        self,
        buffers: Mapping[str, NDArray[Any]],
        carried: ConvolutionState | RecurrentState | None = None,
        positions: NextPositions | None = None,
        windows: WindowBuffers | None = None,
    ) -> None:
        """``buffers``: of layers that see the whole past."""
        super().__init__()
        self._whole, self._windows = buffers, windows
        self._carried, self._positions = carried, positions

    @property
    def buffers(self) -> Mapping[str, NDArray[Any]]:
        """Keys and values of all layers, by name."""
        return self._whole if self._windows is None else {**self._whole, **self._windows.buffers}

    @property
    def position(self) -> int:
        """See :class:`mobilevlm.runtime.engines.DecoderState`."""
        return self.slots if self._positions is None else self._positions.after(self.slots)

    def reachable(self, slots: int) -> int:
        """See :class:`mobilevlm.runtime.engines.DecoderState`."""
        slots = min(slots, self.slots)
        if self._windows is not None:
            slots = self._windows.reachable(slots)
        return slots if self._carried is None else self._carried.reachable(slots)

    def pasts(self) -> Sequence[Float32]:
        """Inputs of short convolutions before the next run, of each such layer."""
        return list(self._carried.past) if isinstance(self._carried, ConvolutionState) else ()

    def append(self, positions: NDArray[np.int64], inputs: Sequence[Float32]) -> None:
        """Count rows that were appended at ``positions (axes, length)``. ``inputs``: those of short
        convolutions, earlier ones first."""
        if self._positions is not None:
            self._positions.append(self.slots, positions)
        if self._carried is not None:
            self._carried.append(self.slots + positions.shape[1], inputs)
        self.advance(positions.shape[1])

    def mark(self) -> None:
        """Note the end of a prompt's piece, which the sequence can go back to."""
        if self._carried is not None:
            self._carried.mark(self.slots)

    def save(self, start: int) -> Segment:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        end = self.slots
        data = np.empty(0, np.float32)
        if self._whole:
            data = np.stack([buffer[0, :, start:end] for buffer in self._whole.values()])
        data.flags.writeable = False
        window = None if self._windows is None else self._windows.save(start, end)
        positions = None if self._positions is None else self._positions.save(start, end)
        fixed = None if self._carried is None else self._carried.save()
        return Segment(start, end, data, positions, fixed, window)

    def restore(self, segment: Segment) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        for buffer, part in zip(self._whole.values(), segment.data, strict=True):
            buffer[0, :, segment.start : segment.end] = part
        if self._windows is not None and segment.window is not None:
            self._windows.restore(segment.end, segment.start, segment.window)
        if self._positions is not None and segment.positions is not None:
            self._positions.restore(segment.start, segment.positions)
        if self._carried is not None and segment.fixed is not None:
            self._carried.restore(segment.end, segment.start, segment.fixed)
        self.resume(segment.end)

    def _go_back(self, slots: int) -> None:
        if self._windows is not None:
            self._windows.go_back(slots)
        if self._carried is not None:
            self._carried.go_back(slots)


class BufferedDecoder:
    """The part of :class:`mobilevlm.runtime.engines.DecoderEngine` that needs no session. States
    are :class:`BufferedState`."""

    def __init__(
        self,
        table: Path,
        embeddings: EmbeddingTable,
        spec: DecoderSpec,
        layers: EmbeddingTable | None = None,
    ) -> None:
        """``layers``: the table of layers' own inputs, in the same file, if there is one."""
        self._mapped_layers = None if layers is None else map_table(table, layers)
        self._layer_shape = (-1, spec.num_hidden_layers, spec.layer_input_size)
        self._visual_id = spec.layer_input_id
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

    def layer_rows(self, ids: Sequence[int] | NDArray[np.int64] | None) -> Float32 | None:
        """Return the rows of the table of layers' own inputs ``(length, layers, layer_input_size)``
        of tokens, -1 for visual ones; none where there is no table.

        Raises:
            MobileVLMError: there is a table and no ids.
        """
        table = self._mapped_layers
        if table is None:
            return None
        if ids is None:
            raise MobileVLMError(
                "rows without ids, by which this decoder looks up per-layer embeddings: give Rows "
                "with ids, -1 for visual tokens"
            )
        known = np.asarray(ids, np.int64)
        check_whole(table)
        rows = table[np.where(known < 0, self._visual_id, known)].astype(np.float32)
        made: Float32 = rows.reshape(self._layer_shape)
        return made * np.float32(self._layer_shape[2] ** 0.5)

    def _row(self, token: int) -> NDArray[Any]:
        """The embedding of one token ``(hidden_size,)``."""
        table = still_open(self._table)
        check_whole(still_open(self._mapped))
        row: NDArray[Any] = table[token]
        if self._embed_scale == 1:
            return row
        # numpy before 2.0 would multiply a row of float16 in float16, unlike ``embed``.
        return row.astype(np.float32) * np.float32(self._embed_scale)

    def save(self, state: DecoderState, start: int) -> Segment:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. ``data``:
        ``(2 · layers, num_key_value_heads, positions, head_dim)``, keys before values, in the
        buffers' type."""
        assert isinstance(state, BufferedState)
        return state.save(start)

    def restore(self, state: DecoderState, segment: Segment) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, BufferedState)
        if isinstance(segment.data, np.memmap):  # the bundle's system prompt
            check_whole(segment.data)
        state.restore(segment)


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
