"""The embedding table of a GGUF file, read row by row."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import GgufTensor
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.engines.onnx.mapped_pages import check_whole


class EmbeddingRows:
    """Rows of the embedding table in a mapped GGUF file, as float32.

    Rows go through ggml's own functions, so they are what llama.cpp itself computes with.
    """

    def __init__(self, tensor: GgufTensor) -> None:
        path = tensor.path
        rows, self._columns = tensor.shape
        self._table = np.memmap(path, np.uint8, "r", tensor.offset, (rows, tensor.row_size))
        self._whole = np.memmap(path, np.uint8, "r")
        self._to_float = None if tensor.type == "F32" else _row_function(path, tensor.type)

    def check(self) -> None:
        """Check that the file, which holds all weights of the decoder, still has them.

        Raises:
            BundleError: it became shorter.
        """
        check_whole(self._whole)

    def read(self, ids: Sequence[int]) -> Float32:
        """Rows ``(len(ids), columns)``."""
        self.check()
        stored = np.ascontiguousarray(self._table[np.asarray(ids, np.int64)])
        if self._to_float is None:
            return stored.view(np.float32)
        result = np.empty((len(ids), self._columns), np.float32)
        self._to_float(stored.ctypes.data, result.ctypes.data, result.size)
        return result


def _row_function(path: Path, kind: str) -> Any:
    """ggml's function from a row of this type to float32: ``(source, target, values)``."""
    from llama_cpp import _ggml

    halves = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}
    # ggml spells them dequantize_row_q6_K, dequantize_row_iq4_nl …
    name = halves.get(kind, "dequantize_row_" + kind.lower().replace("_k", "_K"))
    try:
        function: Any = _ggml.libggml[name]
    except AttributeError:
        raise BundleError(
            f"{path}: llama.cpp has no {name!r} for embeddings of type {kind}: convert the file"
        ) from None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function.restype = None
    return function
