"""The decoder stage in llama.cpp, from a GGUF file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.architectures import scales_rows
from mobilevlm.gguf.file import read_gguf
from mobilevlm.plan import PREFILL_CHUNK
from mobilevlm.prompt import Rows
from mobilevlm.runtime.engines import (
    DecoderState,
    ExpertChoices,
    Float32,
    Segment,
    chunk_spans,
    no_experts,
    still_open,
    wanted_of,
)
from mobilevlm.runtime.engines.llama.gguf_check import check_decoder
from mobilevlm.runtime.engines.llama.gguf_decoder import GgufDecoder
from mobilevlm.runtime.engines.llama.native import LLAMA, NativeModel, address, llama_library
from mobilevlm.runtime.engines.onnx.forking import free_with, note_threads
from mobilevlm.runtime.engines.state import NextPositions, SlotState


class LlamaState(SlotState):
    """A llama_context: keys and values of one sequence, in float16 as llama.cpp has them (float32
    for a float32 file), allocated once for the whole context.

    With positions of several axes it can go back to any row that is not inside an image.
    """

    def __init__(
        self,
        model: NativeModel,
        context_length: int,
        exact: bool,
        threads: int,
        slides: bool = False,
        chunk: int = PREFILL_CHUNK,
        convolves: bool = False,
        axes: bool = False,
    ) -> None:
        """``slides``: the decoder has layers with a sliding window; ``chunk``: most positions of a
        run; ``convolves``: it has short convolutions, of which llama.cpp has the last state;
        ``axes``: positions have several."""
        super().__init__()
        self.next = NextPositions(context_length) if axes else None
        self._convolves = convolves
        library = llama_library()
        options = library.llama_context_default_params()
        options.n_ctx = context_length
        options.n_batch = options.n_ubatch = min(chunk, context_length)
        options.n_outputs_max_per_seq = 0  # as many as a batch has
        options.n_threads = options.n_threads_batch = threads
        self._slides = slides
        if slides:  # these layers keep all positions, so that a state can go back
            options.swa_full = options.kv_unified = True
            options.n_seq_max = 2
        if exact:
            options.type_k = options.type_v = library.GGML_TYPE_F32
            options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.pointer = library.llama_init_from_model(model.pointer, options)
        if not self.pointer:
            raise MobileVLMError(
                f"llama.cpp cannot make a context of {context_length} positions: most likely "
                f"there is too little memory"
            )
        self._memory = library.llama_get_memory(self.pointer)
        # The finalizer holds the model, which must live longer than its contexts.
        free_with(self, _free_context, library, self.pointer, model)

    @property
    def position(self) -> int:
        """See :class:`mobilevlm.runtime.engines.DecoderState`."""
        return self.position_after(self.slots)

    def position_after(self, slots: int) -> int:
        """Return the position of the token after so many rows; inside an image that of its rows."""
        return slots if self.next is None else self.next.after(slots)

    @property
    def last_position(self) -> int:
        """Position of the last row on the axis of time, by which llama.cpp orders rows; -1 if there
        is none."""
        return int(llama_library().llama_memory_seq_pos_max(self._memory, 0))

    def reachable(self, slots: int) -> int:
        """See :class:`mobilevlm.runtime.engines.DecoderState`."""
        reached = super().reachable(slots)
        if reached == self.slots:
            return reached
        if self._convolves:
            return 0
        # Rows of an image have one position on the axis by which llama.cpp removes rows.
        while reached and self.position_after(reached) == self.position_after(reached - 1):
            reached -= 1
        return reached

    def _go_back(self, slots: int) -> None:
        if not self._remove(slots):
            raise MobileVLMError("llama.cpp cannot go back in this sequence")

    def _remove(self, slots: int) -> bool:
        """Remove what is behind so many rows; return whether llama.cpp could."""
        sequence = 0 if self._convolves else -1  # llama.cpp refuses -1 for short convolutions
        start = self.position_after(slots)
        return bool(llama_library().llama_memory_seq_rm(self._memory, sequence, start, -1))

    def append(self, batch: Any) -> None:
        """Runs a batch; after a failure the sequence is as it was."""
        library = llama_library()
        note_threads(LLAMA)
        code = library.llama_decode(self.pointer, batch)
        if code:
            self._remove(self.slots)
            reasons = {1: "the context is full", -2: "too little memory"}
            raise MobileVLMError(
                f"llama.cpp failed after {self.slots} positions: "
                f"{reasons.get(code, 'error')} (code {code})"
            )
        self.advance(batch.n_tokens)

    def save(self) -> NDArray[np.uint8]:
        """Return the whole sequence in llama.cpp's own format of a context. That of a sequence
        leaves out what no window of a sliding layer sees any more: it could not go back."""
        library = llama_library()
        data = np.empty(library.llama_state_get_size(self.pointer), np.uint8)
        written = library.llama_state_get_data(
            self.pointer, address(data, ctypes.c_uint8), data.size
        )
        if written != data.size:
            raise MobileVLMError("llama.cpp cannot save this sequence")
        data.flags.writeable = False
        return data

    def restore(self, data: NDArray[np.uint8], length: int) -> None:
        """Replace the sequence by a saved one of ``length`` positions."""
        library = llama_library()
        self.rewind(0)
        if not library.llama_state_set_data(self.pointer, address(data, ctypes.c_uint8), data.size):
            raise MobileVLMError("llama.cpp cannot take a saved sequence back")
        if self._slides:
            # llama.cpp would put new positions where it has those that no window sees any more,
            # unless these belong to a second sequence too.
            library.llama_memory_seq_cp(self._memory, 0, 1, 0, -1)
        self.resume(length)

    def logits(self, index: int, count: int, vocab_size: int) -> Float32:
        """Logits of ``count`` positions of the last batch, from ``index`` on: a view
        ``(count, vocab_size)``, valid until the next batch."""
        pointer = llama_library().llama_get_logits_ith(self.pointer, index)
        return np.ctypeslib.as_array(pointer, (count, vocab_size))


def _free_context(library: Any, pointer: int, model: NativeModel) -> None:
    library.llama_free(pointer)


@dataclass(frozen=True)
class Batch:
    """Rows of one run."""

    embeds: Float32
    """(rows, width)"""
    placed: NDArray[np.int32]
    """See :meth:`LlamaDecoder._placed`."""


class LlamaDecoder(GgufDecoder):
    """See :class:`mobilevlm.runtime.engines.DecoderEngine`. One model, a context per state. Rows
    that see each other are one run without a causal mask."""

    def __init__(self, path: Path, spec: DecoderSpec, threads: int) -> None:
        header = read_gguf(path)
        check_decoder(header, spec)
        self._model: NativeModel | None = NativeModel(path)
        super().__init__(header, spec, threads)
        self._scales_rows = scales_rows(header.architecture)

    @property
    def model(self) -> NativeModel:
        """Loaded decoder, as an image encoder of llama.cpp needs it."""
        return still_open(self._model)

    @property
    def brought_in_bytes(self) -> int | None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. All weights are in memory."""
        return None

    def new_state(self) -> LlamaState:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        slides = len(self._spec.sliding_layers) > 0
        return LlamaState(
            self.model,
            self._spec.context_length,
            self._exact,
            self._threads,
            slides,
            convolves=self._spec.attention_layers < self._spec.num_hidden_layers,
            axes=len(self._spec.rope_sections) > 0,
        )

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. llama.cpp runs dense ones only."""
        raise no_experts()

    def _append(self, state: DecoderState, rows: Rows, count: int | None) -> Float32:
        """Append rows; return the logits of the last ``count`` (none: of all)."""
        assert isinstance(state, LlamaState)
        still_open(self._model)
        still_open(self._rows).check()
        placed = self._placed(state, rows)
        found = []
        for start, end in self._runs(rows):
            run = Batch(self._embeds(rows[start:end]), placed[:, start:end])
            wanted = wanted_of(count, (start, end), len(rows))
            found.append(self._run(state, run, wanted, (start, end) in rows.blocks))
        return np.concatenate(found)

    def _runs(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """Yield the spans of rows that are run together.

        Raises:
            MobileVLMError: more rows see each other than a context is made for.
        """
        for first, last in rows.blocks:
            if last - first > PREFILL_CHUNK:
                raise MobileVLMError(
                    f"{last - first} rows of an image see each other, llama.cpp is given at most "
                    f"{PREFILL_CHUNK} in one run: use --engine onnx"
                )
        ends = sorted({0, len(rows), *chain.from_iterable(rows.blocks)})
        for start, end in pairwise(ends):
            for first, last in chunk_spans(end - start, (), PREFILL_CHUNK):
                yield start + first, start + last

    def _embeds(self, rows: Rows) -> Float32:
        """Return what llama.cpp reads of rows: behind each what is added after the first layers."""
        embeds = rows.embeds
        if self._scales_rows:
            embeds = embeds / np.float32(self._spec.embed_scale)
        deep = rows.deep or [np.zeros_like(embeds)] * len(self._spec.deep_layers)
        return np.ascontiguousarray(np.concatenate([embeds, *deep], axis=1), np.float32)

    def _placed(self, state: LlamaState, rows: Rows) -> NDArray[np.int32]:
        """Return the positions of rows, and below them the one after each, which inside an image is
        that of its rows ``(axes + 2, rows)``; without several axes nothing.

        llama.cpp's fourth axis is that of time again: it turns the pairs that sections leave over.

        Raises:
            MobileVLMError: rows stand before earlier ones on the axis of time.
        """
        if state.next is None:
            return np.empty((0, len(rows)), np.int32)
        positions = rows.positions
        if positions is None:
            following = np.arange(state.position, state.position + len(rows))
            positions = np.tile(following, (self._spec.position_axes, 1))
        times = positions[0]
        if (np.diff(times, prepend=state.last_position) < 0).any():
            raise MobileVLMError(
                "a clip lasts longer than the text behind it leaves room for, and llama.cpp orders "
                "rows by their time alone: use --engine onnx, or fewer frames"
            )
        end = max(state.position, int(positions.max()) + 1)
        return np.vstack([positions, times, np.append(times[1:], end)]).astype(np.int32)

    def _run(self, state: LlamaState, run: Batch, count: int, both_ways: bool) -> Float32:
        """Append a run; return the logits of its last ``count`` positions."""
        length, library = len(run.embeds), llama_library()
        wanted = np.zeros(length, np.int8)
        wanted[length - count :] = 1
        places = np.ascontiguousarray(run.placed[:-1])
        batch = library.llama_batch(
            n_tokens=length,
            embd=address(run.embeds, ctypes.c_float),
            pos=address(places, ctypes.c_int32) if len(places) else None,
            logits=address(wanted, ctypes.c_int8),
        )
        slots = state.slots
        if both_ways:
            library.llama_set_causal_attn(state.pointer, False)
        try:
            state.append(batch)
        finally:
            if both_ways:
                library.llama_set_causal_attn(state.pointer, True)
        if state.next is not None:
            state.next.place(slots, run.placed)
        if count == 0:
            return np.empty((0, self._spec.vocab_size), np.float32)
        return state.logits(length - count, count, self._spec.vocab_size).copy()

    def step(self, state: DecoderState, token: int) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, LlamaState)
        if state.next is not None:  # llama.cpp leaves the fourth axis of tokens at 0
            answered: Float32 = self._append(state, Rows(self.embed([token])), 1)[0]
            return answered
        still_open(self._model)
        still_open(self._rows).check()
        tokens = np.array([token], np.int32)
        batch = llama_library().llama_batch(n_tokens=1, token=address(tokens, ctypes.c_int32))
        state.append(batch)
        result: Float32 = state.logits(0, 1, self._spec.vocab_size)[0]
        return result

    def save(self, state: DecoderState, start: int) -> Segment:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. llama.cpp saves from position 0."""
        assert isinstance(state, LlamaState)
        placed = None if state.next is None else state.next.save(0, state.slots)
        return Segment(0, state.slots, state.save(), placed)

    def restore(self, state: DecoderState, segment: Segment) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, LlamaState)
        state.restore(segment.data, segment.end)
        if state.next is not None:
            assert segment.positions is not None
            state.next.restore(0, segment.positions)

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self._model = self._rows = None
