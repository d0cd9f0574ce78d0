"""The decoder stage in llama.cpp, from a GGUF file."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.architectures import scales_rows
from mobilevlm.gguf.file import read_gguf
from mobilevlm.plan import PREFILL_CHUNK
from mobilevlm.runtime.engines import (
    DecoderState,
    ExpertChoices,
    Float32,
    Segment,
    no_experts,
    still_open,
)
from mobilevlm.runtime.engines.llama.gguf_check import check_decoder
from mobilevlm.runtime.engines.llama.gguf_decoder import GgufDecoder
from mobilevlm.runtime.engines.llama.native import LLAMA, NativeModel, address, llama_library
from mobilevlm.runtime.engines.onnx.forking import free_with, note_threads
from mobilevlm.runtime.engines.state import SlotState


class LlamaState(SlotState):
    """A llama_context: keys and values of one sequence, in float16 as llama.cpp has them (float32
    for a float32 file), allocated once for the whole context."""

    def __init__(
        self,
        model: NativeModel,
        context_length: int,
        exact: bool,
        threads: int,
        slides: bool = False,
        chunk: int = PREFILL_CHUNK,
    ) -> None:
        """``slides``: the decoder has layers with a sliding window; ``chunk``: most positions of a
        run."""
        super().__init__()
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

    def position_after(self, slots: int) -> int:
        """Return the position of the token after so many rows."""
        return slots

    def _go_back(self, slots: int) -> None:
        start = self.position_after(slots)
        if not llama_library().llama_memory_seq_rm(self._memory, -1, start, -1):
            raise MobileVLMError("llama.cpp cannot go back in this sequence")

    def append(self, batch: Any) -> None:
        """Runs a batch; after a failure the sequence is as it was."""
        library = llama_library()
        note_threads(LLAMA)
        code = library.llama_decode(self.pointer, batch)
        if code:
            library.llama_memory_seq_rm(self._memory, -1, self.position_after(self.slots), -1)
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


class LlamaDecoder(GgufDecoder):
    """See :class:`mobilevlm.runtime.engines.DecoderEngine`. One model, a context per state."""

    def __init__(self, path: Path, spec: DecoderSpec, threads: int) -> None:
        header = read_gguf(path)
        check_decoder(header, spec)
        self._model: NativeModel | None = NativeModel(path)
        super().__init__(header, spec, threads)
        self._scales_rows = scales_rows(header.architecture)

    @property
    def model(self) -> NativeModel:
        """What an image encoder needs to know its decoder."""
        return still_open(self._model)

    @property
    def brought_in_bytes(self) -> int | None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. All weights are in memory."""
        return None

    def new_state(self) -> LlamaState:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        slides = len(self._spec.sliding_layers) > 0
        return LlamaState(self.model, self._spec.context_length, self._exact, self._threads, slides)

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. llama.cpp runs dense ones only."""
        raise no_experts()

    def _append(self, state: DecoderState, embeds: Float32, count: int) -> Float32:
        """Appends a chunk; logits of its last ``count`` positions."""
        assert isinstance(state, LlamaState)
        still_open(self._model)
        still_open(self._rows).check()
        if self._scales_rows:
            embeds = embeds / np.float32(self._spec.embed_scale)
        chunk = np.ascontiguousarray(embeds, np.float32)
        wanted = np.zeros(len(chunk), np.int8)
        wanted[len(chunk) - count :] = 1
        batch = llama_library().llama_batch(
            n_tokens=len(chunk),
            embd=address(chunk, ctypes.c_float),
            logits=address(wanted, ctypes.c_int8),
        )
        state.append(batch)
        if count == 0:
            return np.empty((0, self._spec.vocab_size), np.float32)
        return state.logits(len(chunk) - count, count, self._spec.vocab_size).copy()

    def step(self, state: DecoderState, token: int) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, LlamaState)
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
        return Segment(0, state.slots, state.save())

    def restore(self, state: DecoderState, segment: Segment) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, LlamaState)
        state.restore(segment.data, segment.end)

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self._model = self._rows = None
