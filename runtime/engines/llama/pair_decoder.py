"""The language model of a pair of GGUF files of any family: token ids and rows of images in,
positions as mtmd has them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.gguf.file import GgufFile
from mobilevlm.plan import PREFILL_CHUNK
from mobilevlm.prompt import Arrays, Rows
from mobilevlm.runtime.engines import (
    DecoderState,
    ExpertChoices,
    Float32,
    Segment,
    still_open,
)
from mobilevlm.runtime.engines.llama.engine import LlamaState
from mobilevlm.runtime.engines.llama.native import NativeModel, address, llama_library
from mobilevlm.runtime.engines.llama.tokenizer import LlamaTokenizer

LONGEST_BLOCK = 2048
"""Rows of an image that see each other, which must be in one run."""


@dataclass(frozen=True)
class Placed:
    """Rows of an image, or a part of them, in their places."""

    embeds: Float32
    """(rows, width)"""
    positions: NDArray[np.int32]
    """Positions of rows of a run that begins at 0 (rows, 4)"""
    moves: NDArray[np.int32]
    """1 where a position counts from the run's beginning, else 0 (rows, 4)"""
    steps: int
    """Positions that the run takes."""
    see_each_other: bool
    """True if attention inside the run goes both ways."""


class PairState(LlamaState):
    """A sequence whose positions may have several axes. Of a model that keeps more than keys and
    values it cannot go back but to its beginning."""

    def __init__(
        self, model: NativeModel, context_length: int, exact: bool, threads: int, chunk: int
    ) -> None:
        library = llama_library()
        slides = library.llama_model_n_swa(model.pointer) > 0
        super().__init__(model, context_length, exact, threads, slides, chunk, axes=True)
        self._goes_back = goes_back(model)

    def reachable(self, slots: int) -> int:
        """See :class:`mobilevlm.runtime.engines.DecoderState`."""
        if self._goes_back or slots >= self.slots:
            return min(slots, self.slots)
        return 0

    def _go_back(self, slots: int) -> None:
        if slots:
            super()._go_back(slots)
        else:  # states of layers without attention are removed as a whole alone
            llama_library().llama_memory_clear(self._memory, False)


def goes_back(model: NativeModel) -> bool:
    """Return whether a sequence of a model is keys and values alone, which can go back."""
    library = llama_library()
    kinds = (library.llama_model_is_recurrent, library.llama_model_is_hybrid)
    return not any(kind(model.pointer) for kind in kinds)


class PairDecoder:
    """See :class:`mobilevlm.runtime.engines.DecoderEngine`, which it is with ``append`` and
    ``append_rows`` in place of what takes embeddings: architectures do with a token's row what is
    their own (runtime/sequence/pair_session.py)."""

    def __init__(self, header: GgufFile, spec: DecoderSpec, threads: int) -> None:
        """``header``: of the file, checked."""
        self._spec, self._threads, self._path = spec, threads, header.path
        self.exact = {tensor.type for tensor in header.tensors.values()} == {"F32"}
        """True if keys and values are float32 too"""
        self._model: NativeModel | None = NativeModel(header.path)
        self.tokenizer = LlamaTokenizer(self._model)
        self.has_axes = False
        """True if positions of rows have several axes"""
        self.blocks = False
        """True if rows of an image see each other"""

    @property
    def model(self) -> NativeModel:
        """Model that an image encoder is opened beside."""
        return still_open(self._model)

    @property
    def goes_back(self) -> bool:
        """True if a sequence can go back to where it was."""
        return goes_back(self.model)

    def placed(self, embeds: Float32, arrays: Arrays, number: int, first: int) -> Placed:
        """Return rows of a run of an image in their places. ``arrays``: of the image
        (pair_images.py); ``number``: of the run; ``first``: rows of the image before it."""
        part = slice(first, first + len(embeds))
        steps, both_ways = (int(value) for value in arrays["runs"][number])
        return Placed(
            embeds, arrays["positions"][part], arrays["moves"][part], steps, bool(both_ways)
        )

    @property
    def brought_in_bytes(self) -> int | None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. All weights are in memory."""
        return None

    def new_state(self) -> PairState:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        chunk = LONGEST_BLOCK if self.blocks else PREFILL_CHUNK
        length = self._spec.context_length
        return PairState(self.model, length, self.exact, self._threads, chunk)

    def append(self, state: DecoderState, ids: Sequence[int], count: int) -> Float32:
        """Append tokens; logits of the last ``count`` positions."""
        found = []
        for start in range(0, len(ids), PREFILL_CHUNK):
            tokens = np.asarray(ids[start : start + PREFILL_CHUNK], np.int32)
            wanted = min(max(count - (len(ids) - start - len(tokens)), 0), len(tokens))
            found.append(self._run(state, len(tokens), wanted, {"token": tokens}))
        return np.concatenate(found)

    def append_rows(self, state: DecoderState, rows: Placed, count: int) -> Float32:
        """Append rows of an image; logits of the last ``count`` positions.

        Raises:
            MobileVLMError: they see each other and are too many for that.
        """
        assert isinstance(state, PairState)
        length, size = len(rows.embeds), PREFILL_CHUNK
        if rows.see_each_other:
            size = LONGEST_BLOCK
            if length > size:
                raise MobileVLMError(
                    f"{self._path}: {length} rows of an image see each other, at most {size} are "
                    f"run together: take a smaller image"
                )
        library, begin = llama_library(), state.position
        placed = rows.positions + begin * rows.moves
        axes = placed if self.has_axes else placed[:, :1]
        found = []
        if rows.see_each_other:
            library.llama_set_causal_attn(state.pointer, False)
        try:
            for start in range(0, length, size):
                part = slice(start, start + size)
                embeds = np.ascontiguousarray(rows.embeds[part], np.float32)
                wanted = min(max(count - (length - start - len(embeds)), 0), len(embeds))
                ends = start + len(embeds) == length
                steps = np.full(len(embeds), begin, np.int64)  # no row but the last has a position
                steps[-1] = begin + rows.steps if ends else begin
                given = {"embd": embeds, "pos": np.ascontiguousarray(axes[part].T, np.int32)}
                found.append(self._run(state, len(embeds), wanted, given, steps))
        finally:
            if rows.see_each_other:
                library.llama_set_causal_attn(state.pointer, True)
        return np.concatenate(found)

    def step(self, state: DecoderState, token: int) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        result: Float32 = self.append(state, [token], 1)[0]
        return result

    def _run(
        self,
        state: DecoderState,
        length: int,
        count: int,
        given: dict[str, NDArray[Any]],
        after: NDArray[np.int64] | None = None,
    ) -> Float32:
        """Run a batch; logits of its last ``count`` positions. ``after``: position after each row,
        where it is not one more."""
        assert isinstance(state, PairState)
        still_open(self._model)
        begin = state.position
        if after is None:
            after = np.arange(begin + 1, begin + length + 1)
            given = {**given, "pos": np.arange(begin, begin + length, dtype=np.int32)}
        wanted = np.zeros(length, np.int8)
        wanted[length - count :] = 1
        kinds = {"token": ctypes.c_int32, "embd": ctypes.c_float, "pos": ctypes.c_int32}
        batch = llama_library().llama_batch(
            n_tokens=length,
            logits=address(wanted, ctypes.c_int8),
            **{name: address(array, kinds[name]) for name, array in given.items()},
        )
        slots = state.slots
        state.append(batch)
        assert state.next is not None
        state.next.append(slots, after[None] - 1)
        if count == 0:
            return np.empty((0, self._spec.vocab_size), np.float32)
        return state.logits(length - count, count, self._spec.vocab_size).copy()

    def save(self, state: DecoderState, start: int) -> Segment:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. llama.cpp saves from position 0."""
        assert isinstance(state, PairState) and state.next is not None
        positions = state.next.save(0, state.slots)
        return Segment(0, state.slots, state.save(), positions)

    def restore(self, state: DecoderState, segment: Segment) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, PairState) and state.next is not None
        assert segment.positions is not None
        state.restore(segment.data, segment.end)
        state.next.restore(0, segment.positions)

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self._model = None

    def embed(self, ids: Sequence[int]) -> Float32:
        """Not to be had: what a token's row becomes is the architecture's own."""
        raise self._no_embeddings()

    def prefill(self, state: DecoderState, rows: Rows, count: int | None = 1) -> Float32:
        """Not to be had, as :meth:`embed`."""
        raise self._no_embeddings()

    def extend(self, state: DecoderState, rows: Rows) -> None:
        """Not to be had, as :meth:`embed`."""
        raise self._no_embeddings()

    def answer(self, state: DecoderState, rows: Rows, count: int | None = None) -> Float32:
        """Not to be had, as :meth:`embed`."""
        raise self._no_embeddings()

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        """Not to be had: llama.cpp does not say."""
        raise MobileVLMError("llama.cpp does not say which experts it uses")

    def _no_embeddings(self) -> BundleError:
        return BundleError(
            f"{self._path}: llama.cpp runs this model from token ids and images alone, no "
            f"embeddings go in or out: export its checkpoint for that"
        )
