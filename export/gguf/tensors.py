"""Writing a GGUF file: metadata and all tensor descriptions first, then one tensor at a time.

Memory holds one tensor; of a stack of experts what is stored, and the values of one. The same input
gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import gguf
import numpy as np
from numpy.typing import NDArray

from mobilevlm.export.gguf.llama_quantizer import quantize_rows
from mobilevlm.export.quantize import q4_0, rtn
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.spec import GGUFType

TYPES: dict[GGUFType, gguf.GGMLQuantizationType] = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q5_0": gguf.GGMLQuantizationType.Q5_0,
    "q5_1": gguf.GGMLQuantizationType.Q5_1,
}
"""Types that are written here for every architecture; llama.cpp mixes the K-quants of its own."""

TensorType: TypeAlias = GGUFType | Literal["q4_k", "q5_k"]
"""Type of one tensor: ``q6_k`` and these two are made by ggml's own functions."""
_K_TYPES: dict[TensorType, gguf.GGMLQuantizationType] = {
    "q4_k": gguf.GGMLQuantizationType.Q4_K,
    "q5_k": gguf.GGMLQuantizationType.Q5_K,
    "q6_k": gguf.GGMLQuantizationType.Q6_K,
}
_STORED = cast("dict[TensorType, gguf.GGMLQuantizationType]", TYPES) | _K_TYPES
_SMALLER_BLOCKS: dict[TensorType, TensorType] = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""Fallbacks of llama.cpp for rows whose length is no multiple of a K-quant's block of 256
weights."""

FILE_TYPES: dict[GGUFType, gguf.LlamaFileType] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
}

WEIGHABLE: tuple[GGUFType, ...] = ("q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k")
"""Types whose rounding can heed an importance matrix."""

BLOCK = q4_0.BLOCK
"""Weights that share a scale."""
K_BLOCK = 256
"""The same of K-quants"""
_LARGEST_HALF = np.float32(np.finfo(np.float16).max)
_CHUNK = 2**22
"""Weights converted at once."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to be: its name in the file, and how to get its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as in numpy; GGUF writes the dimensions in the other order."""
    type: TensorType
    read: Sequence[Callable[[], Float32]]
    """Its values, or of a stack each of its outermost slices."""
    importance: Float32 | None = None
    """``(columns,)``: how much an error in each column counts."""

    @property
    def stored(self) -> TensorType:
        """Type in the file, as llama.cpp's converter: rows that are no multiple of a block get
        float16."""
        kind = self.type
        if kind in _K_TYPES and self.shape[-1] % K_BLOCK:
            kind = _SMALLER_BLOCKS[kind]
        whole = kind in ("f32", "f16", "bf16") or self.shape[-1] % BLOCK == 0
        return kind if whole else "f16"

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[_STORED[self.stored]]
        return math.prod(self.shape) // block * size


def write_file(
    path: Path,
    architecture: str,
    describe: Callable[[gguf.GGUFWriter], None],
    tensors: Sequence[Tensor],
) -> dict[str, float]:
    """Writes a GGUF file. Returns each quantized tensor's relative error.

    ``describe`` adds the metadata.
    """
    writer = gguf.GGUFWriter(path, architecture)
    errors = {}
    try:
        describe(writer)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                tensor.nbytes,
                raw_dtype=_STORED[tensor.stored],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            data, error = _stored(tensor)
            if tensor.stored not in ("f32", "f16", "bf16"):
                errors[tensor.name] = error
            writer.write_tensor_data(data)
            del data  # before the next one comes
    finally:
        writer.close()
    return errors


def _stored(tensor: Tensor) -> tuple[NDArray[np.uint8], float]:
    """A tensor's bytes, and its relative error (the worst slice's). Memory holds the bytes, and the
    values of one slice."""
    data = np.empty((len(tensor.read), tensor.nbytes // len(tensor.read)), np.uint8)
    worst = 0.0
    for slot, read in zip(data, tensor.read, strict=True):
        values, error = convert(read(), tensor.stored, tensor.importance)
        slot[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        worst = max(worst, error)
    return data, worst


def convert(
    values: Float32, kind: TensorType, importance: Float32 | None = None
) -> tuple[NDArray[Any], float]:
    """Values as the bytes of a GGUF type, and the relative error that this made.

    ``importance``: of each column; then llama.cpp chooses the scales of a type in WEIGHABLE.
    """
    if kind == "f32":
        return np.ascontiguousarray(values), 0.0
    if kind == "f16":
        return values.clip(-_LARGEST_HALF, _LARGEST_HALF).astype(np.float16), 0.0
    rows = values.reshape(-1, values.shape[-1])
    if kind not in WEIGHABLE:
        importance = None
    if kind == "q4_0" and importance is None:
        quantized = rtn.quantize(rows, q4_0.SCHEME)  # the integers of our ``q4``
        return q4_0.pack(quantized), quantized.relative_error
    step = max(1, _CHUNK // rows.shape[1])
    parts, error, energy = [], 0.0, 0.0
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if importance is None and kind not in _K_TYPES:
            data = gguf.quants.quantize(part, _STORED[kind])
        else:
            data = quantize_rows(part, _STORED[kind], importance)
        if kind != "bf16":
            restored = gguf.quants.dequantize(data, _STORED[kind])
            error += float(np.square(restored - part).sum(dtype=np.float64))
            energy += float(np.square(part).sum(dtype=np.float64))
        parts.append(data)
    return np.concatenate(parts), math.sqrt(error / energy) if energy else 0.0
