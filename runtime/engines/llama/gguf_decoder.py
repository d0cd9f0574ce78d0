"""What decoders of GGUF files share, whichever graph they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import numpy as np

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.gguf.file import GgufFile
from mobilevlm.runtime.engines import DecoderState, Float32, Positions, in_chunks, still_open
from mobilevlm.runtime.engines.llama.embedding_rows import EmbeddingRows


class GgufDecoder(ABC):
    """See :class:`mobilevlm.runtime.engines.DecoderEngine`: all that follows from appending a
    chunk. One graph runs prompts and answers alike."""

    def __init__(self, header: GgufFile, spec: DecoderSpec, threads: int) -> None:
        """``header``: of the file, checked."""
        self._spec, self._threads = spec, threads
        tensors = header.tensors
        self._rows: EmbeddingRows | None = EmbeddingRows(tensors["token_embd.weight"])
        self._exact = {tensor.type for tensor in tensors.values()} == {"F32"}
        """Whether keys and values are float32 too"""

    @abstractmethod
    def _append(self, state: DecoderState, embeds: Float32, count: int) -> Float32:
        """Appends a chunk; logits of its last ``count`` positions."""

    def embed(self, ids: Sequence[int]) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        rows = still_open(self._rows).read(ids)
        scale = np.float32(self._spec.embed_scale)
        return rows if scale == 1 else rows * scale

    def prefill(
        self,
        state: DecoderState,
        embeds: Float32,
        all_logits: bool = False,
        positions: Positions | None = None,
        deep: Sequence[Float32] = (),
    ) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        count = len(embeds) if all_logits else 1
        append = partial(self._append, state)
        return in_chunks(append, embeds, count, positions=positions, deep=deep)

    def extend(
        self,
        state: DecoderState,
        embeds: Float32,
        positions: Positions | None = None,
        deep: Sequence[Float32] = (),
    ) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        in_chunks(partial(self._append, state), embeds, 0, positions=positions, deep=deep)

    def answer(self, state: DecoderState, embeds: Float32) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        return self.prefill(state, embeds, all_logits=True)
