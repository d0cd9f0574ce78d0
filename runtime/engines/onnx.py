"""ONNX Runtime for both stages, on the CPU."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mobilevlm.bundle import EmbeddingTable
from mobilevlm.errors import BundleError
from mobilevlm.runtime.engines import DecoderState, Float32, Segment, in_chunks, still_open
from mobilevlm.spec import DecoderSpec


def open_session(path: Path, threads: int, entries: Mapping[str, str] = {}) -> ort.InferenceSession:
    """A session on an ONNX file. ``entries``: further settings of it, as onnxruntime names them.

    Raises:
        BundleError: onnxruntime cannot load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # What multiplies integer weights of fixed-point graphs would round their activations, whose 16
    # bits the graph asks for, to 8 once more: 13 times the error. 1 is float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds, none of them public
        reason = str(error).strip().splitlines()[-1]
        raise BundleError(f"{path}: onnxruntime cannot load it: {reason:.200}") from None


class OnnxVision:
    """The vision stage: tower and projector in one graph."""

    def __init__(self, path: Path, threads: int, entries: Mapping[str, str] = {}) -> None:
        self._session: ort.InferenceSession | None = open_session(path, threads, entries)

    def encode(self, pixels: NDArray[np.uint8]) -> Float32:
        """See :class:`mobilevlm.runtime.engines.VisionEngine`."""
        return self._run("visual_tokens", pixels)

    def features(self, pixels: NDArray[np.uint8]) -> Float32:
        """See :class:`mobilevlm.runtime.engines.VisionEngine`."""
        return self._run("features", pixels)

    def _run(self, output: str, pixels: NDArray[np.uint8]) -> Float32:
        result: Float32 = still_open(self._session).run([output], {"pixels": pixels[None]})[0][0]
        return result

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.VisionEngine`."""
        self._session = None


def map_table(path: Path, embeddings: EmbeddingTable) -> NDArray[Any]:
    """The embedding rows ``(rows, columns)`` in a file, mapped."""
    mapped = np.memmap(
        path,
        dtype=embeddings.dtype,
        mode="r",
        offset=embeddings.offset,
        shape=(embeddings.rows, embeddings.columns),
    )
    return mapped.view(np.ndarray)  # indexing that takes a tenth


class OnnxState:
    """KV buffers ``(num_key_value_heads, context_length, head_dim)`` per layer, allocated once.

    Their pages become resident as positions are written, so a short sequence in a long context
    costs little.
    """

    def __init__(self, spec: DecoderSpec, session: ort.InferenceSession) -> None:
        self.length = 0
        shape = (1, spec.num_key_value_heads, spec.context_length, spec.head_dim)
        self.buffers = {
            f"{index}.{kind}": _lazy_zeros(shape)
            for index in range(spec.num_hidden_layers)
            for kind in ("key", "value")
        }
        self.total_length = np.zeros(1, np.int32)
        self.step_embeds = np.zeros((1, 1, spec.hidden_size), np.float32)
        self.step_positions = np.zeros(1, np.int64)
        self.step_logits = np.zeros((1, 1, spec.vocab_size), np.float32)
        self.step_binding = self.bind(
            session, self.step_embeds, self.step_positions, self.step_logits
        )

    def bind(
        self,
        session: ort.InferenceSession,
        embeds: Float32,
        positions: NDArray[np.int64],
        logits: Float32,
    ) -> Any:
        """A binding of these arrays and of the KV buffers as both past and present. It holds
        addresses only: the caller keeps the arrays alive."""
        binding = session.io_binding()
        _bind_input(binding, "inputs_embeds", embeds)
        _bind_input(binding, "total_length", self.total_length)
        _bind_input(binding, "logits_positions", positions)
        _bind_output(binding, "logits", logits)
        for name, buffer in self.buffers.items():
            _bind_input(binding, f"past_key_values.{name}", buffer)
            _bind_output(binding, f"present.{name}", buffer)
        return binding


class OnnxDecoder:
    """The decoder stage; embedding rows are read from a mapped file."""

    def __init__(
        self, path: Path, table: Path, embeddings: EmbeddingTable, spec: DecoderSpec, threads: int
    ) -> None:
        self._spec = spec
        self._session: ort.InferenceSession | None = open_session(path, threads)
        self._table: NDArray[Any] | None = map_table(table, embeddings)

    def new_state(self) -> OnnxState:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        return OnnxState(self._spec, still_open(self._session))

    def embed(self, ids: Sequence[int]) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        return still_open(self._table)[np.asarray(ids, np.int64)].astype(np.float32)

    def prefill(self, state: DecoderState, embeds: Float32, all_logits: bool = False) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        count = len(embeds) if all_logits else 1
        return in_chunks(partial(self._append, state), embeds, count)

    def extend(self, state: DecoderState, embeds: Float32) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        in_chunks(partial(self._append, state), embeds, 0)

    def _append(self, state: DecoderState, embeds: Float32, count: int) -> Float32:
        """Appends a chunk; logits of its last ``count`` positions."""
        assert isinstance(state, OnnxState)
        session = still_open(self._session)
        chunk = np.ascontiguousarray(embeds[None])
        positions = np.arange(len(embeds) - count, len(embeds))
        logits = np.empty((1, count, self._spec.vocab_size), np.float32)
        binding = state.bind(session, chunk, positions, logits)
        state.total_length[0] = state.length + len(embeds)
        session.run_with_iobinding(binding)
        state.length += len(embeds)
        result: Float32 = logits[0]
        return result

    def step(self, state: DecoderState, token: int) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, OnnxState)
        session = still_open(self._session)
        state.step_embeds[0, 0] = still_open(self._table)[token]
        state.total_length[0] = state.length + 1
        session.run_with_iobinding(state.step_binding)
        state.length += 1
        result: Float32 = state.step_logits[0, 0]
        return result

    def save(self, state: DecoderState, start: int) -> Segment:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. ``data``: float32
        ``(2 · layers, num_key_value_heads, positions, head_dim)``, keys before values."""
        assert isinstance(state, OnnxState)
        data = np.stack([buffer[0, :, start : state.length] for buffer in state.buffers.values()])
        data.flags.writeable = False
        return Segment(start, state.length, data)

    def restore(self, state: DecoderState, segment: Segment) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, OnnxState)
        for buffer, part in zip(state.buffers.values(), segment.data, strict=True):
            buffer[0, :, segment.start : segment.end] = part
        state.length = segment.end

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self._session = self._table = None


def _lazy_zeros(shape: tuple[int, ...]) -> Float32:
    """Zeros in fresh pages of 4 KiB (numpy would ask for huge pages, resident at first touch)."""
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, count * 4), np.float32, count).reshape(shape)


def _bind_input(binding: Any, name: str, array: NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
