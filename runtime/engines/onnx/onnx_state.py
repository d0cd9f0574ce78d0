"""State of a sequence in the ONNX decoder on the CPU, and the arrays of a run."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MemoryLimitError
from mobilevlm.prompt import Rows
from mobilevlm.rotary import rotary_at
from mobilevlm.runtime.engines import CacheType, Float32, Positions
from mobilevlm.runtime.engines.onnx.buffered import BufferedState
from mobilevlm.runtime.engines.onnx.mapped_weights import Session
from mobilevlm.runtime.engines.state import (
    ConvolutionState,
    NextPositions,
    RecurrentState,
    WindowBuffers,
)
from mobilevlm.state_buffers import LAYER_ROWS, fixed_buffers, slot_buffers, window_rows


@dataclass(frozen=True)
class RunArrays:
    """Arrays of one run, by their names in the graph; the buffers of slots come besides."""

    length: int
    positions: Positions
    """``(axes, length)``"""
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]

    @property
    def logits(self) -> Float32:
        """``(1, positions, vocab_size)``"""
        return self.outputs["logits"]


class OnnxState(BufferedState):
    """Buffers of :func:`mobilevlm.state_buffers.state_buffers`, made once for the whole context, or
    for the window. ``sequences``: of one length, that take each step together, with room for
    ``slots``.

    Their pages become resident as positions are written, so a short sequence in a long context
    costs little.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        cache: CacheType = np.float32,
        sequences: int = 1,
        slots: int | None = None,
    ) -> None:
        fixed, whole = fixed_buffers(spec), slots or spec.context_length
        made: dict[str, dict[str, NDArray[Any]]] = {"kv": {}, "sliding": {}}
        for buffer in slot_buffers(spec):
            rows = whole if buffer.kind == "kv" else window_rows(spec)
            shape = (sequences, *buffer.sized(rows)[1:])
            made[buffer.kind][buffer.name] = _lazy_zeros(shape, cache)
        windows = made["sliding"]
        carried: ConvolutionState | RecurrentState | None = None
        if fixed:
            carried = RecurrentState(fixed) if spec.delta else ConvolutionState(fixed)
        super().__init__(
            made["kv"],
            carried,
            NextPositions(spec.context_length) if spec.rope_sections else None,
            WindowBuffers(windows, spec.sliding_window) if windows else None,
        )
        self._spec, self._fixed = spec, [part for part in fixed if part.kind == "convolution"]
        self._total_length = np.zeros(1, np.int32)
        self._window_length = np.zeros(1, np.int32)
        self._sound = np.zeros(1, np.float32)
        """1 where the prompt has sound."""
        self.cross: dict[str, Float32] = {}
        """Keys and values of an encoder's output, by their names in the graph."""
        self._step: tuple[Session, RunArrays, Any] | None = None

    def begin(self, cross: dict[str, Float32]) -> None:
        """An empty sequence behind a prompt that an encoder has read."""
        self.rewind(0)
        self.cross, self._step = cross, None

    def run_of(self, rows: Rows, computed: int, stored: Float32 | None = None) -> RunArrays:
        """Return the arrays of a run that appends rows, with room for the logits of the last
        ``computed``. ``stored``: rows of the table of layers' own inputs, where there is one."""
        spec, length = self._spec, len(rows)
        positions = self._text_positions(length) if rows.positions is None else rows.positions
        inputs: dict[str, NDArray[Any]] = {
            "inputs_embeds": np.ascontiguousarray(rows.embeds[None]),
            "total_length": self._total_length,
            "logits_positions": np.arange(length - computed, length),
        }
        outputs = {"logits": np.empty((1, computed, spec.vocab_size), np.float32)}
        if spec.rope_sections:
            inputs["rotary_cos"], inputs["rotary_sin"] = rotary_at(spec, positions)
        if spec.sliding_layers:
            inputs["window_length"] = self._window_length
        if stored is not None:
            inputs[LAYER_ROWS] = stored[None]
        if spec.image_blocks:
            inputs |= image_inputs(rows.blocks, self.slots)
        if spec.sound_rank:
            if rows.heard is not None:
                self._sound[0] = rows.heard
            inputs["sound"] = self._sound
        deep = rows.deep or [np.zeros_like(rows.embeds)] * len(spec.deep_layers)
        for layer, added in zip(spec.deep_layers, deep, strict=True):
            inputs[f"deep.{layer}"] = np.ascontiguousarray(added[None])
        for buffer, past in zip(self._fixed, self.pasts(), strict=True):
            inputs[buffer.past] = past
            rows_read = past.shape[1] + length
            outputs[buffer.present] = np.empty((1, rows_read, past.shape[2]), np.float32)
        return RunArrays(length, positions, inputs, outputs)

    def run(self, session: Session, run: RunArrays, options: Any = None, also: Any = None) -> None:
        """Run a graph, and append its rows. ``also``: further outputs to be filled, by name."""
        binding = self._bind(session, run)
        for name, values in (also or {}).items():
            _bind_output(binding, name, values)
        self._advance(session, run, binding, options)

    def step(self, session: Session, row: Float32, stored: Float32 | None = None) -> Float32:
        """Append one row ``(hidden_size,)`` of text; logits ``(vocab_size,)``, valid until the next
        call. The arrays of a step are bound once for a session. ``stored`` as of :meth:`run_of`."""
        if self._step is None or self._step[0] is not session:
            run = self.run_of(Rows(row[None].astype(np.float32)), 1, stored)
            self._step = session, run, self._bind(session, run)
        _, run, binding = self._step
        run.inputs["inputs_embeds"][0, 0] = row
        if stored is not None:
            run.inputs[LAYER_ROWS][0] = stored
        if self._spec.rope_sections:
            run.positions[:] = self._text_positions(1)
            tables = rotary_at(self._spec, run.positions)
            run.inputs["rotary_cos"][:], run.inputs["rotary_sin"][:] = tables
        self._advance(session, run, binding, None)
        logits: Float32 = run.logits[0, 0]
        return logits

    def fill(self, states: Sequence[OnnxState]) -> None:
        """Make the sequences those of other states, which have one length."""
        [length] = {state.slots for state in states}
        for name, buffer in self.buffers.items():
            for index, state in enumerate(states):
                buffer[index, :, :length] = state.buffers[name][0, :, :length]
        self.resume(length)

    def step_all(self, session: Session, rows: Float32, options: Any) -> Float32:
        """Append a row to each sequence ``(sequences, hidden_size)``; states after the last norm of
        the same shape, valid until the next call."""
        if self._step is None or self._step[0] is not session:
            inputs: dict[str, NDArray[Any]] = {
                "inputs_embeds": np.empty((len(rows), 1, rows.shape[1]), np.float32),
                "total_length": self._total_length,
                "logits_positions": np.zeros(1, np.int64),
            }
            states = np.empty((len(rows), 1, rows.shape[1]), np.float32)
            run = RunArrays(1, np.zeros((1, 1), np.int64), inputs, {"states": states})
            self._step = session, run, self._bind(session, run)
        _, run, binding = self._step
        run.inputs["inputs_embeds"][:, 0] = rows
        self._advance(session, run, binding, options)
        found: Float32 = run.outputs["states"][:, 0]
        return found

    def unbind(self) -> None:
        """Lets go of the session, which the binding of a step holds."""
        self._step = None

    def _advance(self, session: Session, run: RunArrays, binding: Any, options: Any) -> None:
        self._total_length[0] = self.slots + run.length
        if self._windows is not None:
            self._windows.place(self.slots, run.length)
            self._window_length[0] = self._total_length[0] - self._windows.first
        self._bind_carried(binding)
        session.run_with_iobinding(binding, options)
        presents = [run.outputs[buffer.present] for buffer in self._fixed]
        self.append(run.positions, presents)

    def _bind_carried(self, binding: Any) -> None:
        """Bind what a run reads and writes of states that runs replace, in turn the one and the
        other half of their memory."""
        if not isinstance(self._carried, RecurrentState):
            return
        for name, array in self._carried.past().items():
            _bind_input(binding, name, array)
        for name, array in self._carried.present().items():
            _bind_output(binding, name, array)

    def _text_positions(self, length: int) -> Positions:
        following = np.arange(self.position, self.position + length)
        return np.tile(following, (self._spec.position_axes, 1))

    def _bind(self, session: Session, run: RunArrays) -> Any:
        """A binding of these arrays and of the KV buffers as both past and present. It holds
        addresses only: the caller keeps the arrays alive."""
        binding = session.io_binding()
        for name, array in (*run.inputs.items(), *self.cross.items()):
            _bind_input(binding, name, array)
        for name, array in run.outputs.items():
            _bind_output(binding, name, array)
        for name, buffer in self.buffers.items():
            _bind_input(binding, f"past_key_values.{name}", buffer)
            _bind_output(binding, f"present.{name}", buffer)
        return binding


def image_inputs(blocks: Sequence[tuple[int, int]], slots: int) -> dict[str, NDArray[np.int64]]:
    """Return the graph's inputs that say which rows of a run behind so many slots lie in images,
    and the slot behind each one's image."""
    rows = [np.arange(start, end) for start, end in blocks]
    ends = [np.full(end - start, slots + end) for start, end in blocks]
    empty = np.empty(0, np.int64)
    return {
        "image_rows": np.concatenate([empty, *rows]),
        "image_ends": np.concatenate([empty, *ends]),
    }


def _lazy_zeros(shape: tuple[int, ...], kind: CacheType) -> NDArray[Any]:
    """Zeros in fresh pages of 4 KiB (numpy would ask for huge pages, resident at first touch)."""
    count = math.prod(shape)
    size = count * np.dtype(kind).itemsize
    try:
        fresh = mmap.mmap(-1, size)
    except (OSError, OverflowError, ValueError):
        raise MemoryLimitError(
            f"keys and values of the whole context take {size / 1e6:.0f} MB of address space in "
            f"each layer, the system refuses that: use a model with a shorter context"
        ) from None
    return np.frombuffer(fresh, kind, count).reshape(shape)


def _bind_input(binding: Any, name: str, array: NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
