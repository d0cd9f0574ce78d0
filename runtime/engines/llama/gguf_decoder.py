"""Base of the decoders of GGUF files, whichever graph they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.gguf.file import GgufFile
from mobilevlm.prompt import Rows
from mobilevlm.runtime.engines import DecoderState, Float32, still_open
from mobilevlm.runtime.engines.llama.embedding_rows import EmbeddingRows


class GgufDecoder(ABC):
    """See :class:`mobilevlm.runtime.engines.DecoderEngine`: all that follows from appending rows.
    One graph runs prompts and answers alike."""

    def __init__(self, header: GgufFile, spec: DecoderSpec, threads: int) -> None:
        """``header``: of the file, checked."""
        self._spec, self._threads = spec, threads
        tensors = header.tensors
        self._rows: EmbeddingRows | None = EmbeddingRows(tensors["token_embd.weight"])
        self._exact = {tensor.type for tensor in tensors.values()} == {"F32"}
        """True if keys and values are float32 too"""

    @abstractmethod
    def _append(self, state: DecoderState, rows: Rows, count: int | None) -> Float32:
        """Append rows; return the logits of the last ``count`` (none: of all)."""

    def embed(self, ids: Sequence[int]) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        rows = still_open(self._rows).read(ids)
        scale = np.float32(self._spec.embed_scale)
        return rows if scale == 1 else rows * scale

    def prefill(self, state: DecoderState, rows: Rows, count: int | None = 1) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        return self._append(state, rows, count)

    def extend(self, state: DecoderState, rows: Rows) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self._append(state, rows, 0)

    def answer(self, state: DecoderState, rows: Rows, count: int | None = None) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        return self.prefill(state, rows, count)
