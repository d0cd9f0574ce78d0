"""Types that llama.cpp's own quantizer makes (llama-cpp-python): K-quants, and rounding by
importance."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.plan import default_threads
from mobilevlm.runtime.engines.llama.native import address, catch_log, llama_library
from mobilevlm.spec import GGUFType


def quantizer_version(purpose: str) -> str:
    """Version of llama-cpp-python. ``purpose``: what it is needed for, for the error.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or does not load.
    """
    llama_library(purpose)
    return importlib.metadata.version("llama-cpp-python")


def quantize_file(
    source: Path, target: Path, kind: GGUFType, importance: Mapping[str, Float32]
) -> None:
    """Writes a float16 GGUF file again in a K-quant. Rows that are no multiple of its blocks of 256
    get a type with blocks of 32, as llama.cpp chooses.

    ``importance``: of each column ``(in_size,)``, by the names of the matrices; empty: none. It
    does not change which type a matrix gets.

    Raises:
        MobileVLMError: llama.cpp refuses.
    """
    llama = llama_library(f"the type {kind}")
    catch_log()
    params = llama.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    params.nthread = default_threads()
    if importance:
        array = _importance_array(llama, importance)
        params.imatrix = array
    status = llama.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    if status != 0:
        raise MobileVLMError(f"{target}: llama.cpp could not quantize the decoder to {kind}")


def quantize_rows(
    values: Float32, kind: gguf.GGMLQuantizationType, importance: Float32 | None
) -> NDArray[np.uint8]:
    """Rows ``(rows, columns)`` as the blocks of a type ``(rows, bytes of a row)``. Each scale is
    chosen for the least squared error, every column counted by its importance ``(columns,)`` where
    there is one.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or does not load.
    """
    llama_library("rounding by importance" if importance is not None else f"the type {kind.name}")
    from llama_cpp._ggml import libggml

    rows, columns = values.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    source = np.ascontiguousarray(values, np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    out = np.empty((rows, columns // block * size), np.uint8)
    if weights is not None and weights.shape != (
        columns,
    ):  # what stands behind a shorter one would be read
        raise ValueError(f"importance of shape {weights.shape} for {columns} columns")
    quantize = libggml.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t

    def convert(part: NDArray[np.int64]) -> int:
        written: int = quantize(
            ctypes.c_int(kind),
            address(source, ctypes.c_float),
            address(out, ctypes.c_uint8),
            ctypes.c_int64(int(part[0]) * columns),
            ctypes.c_int64(len(part)),
            ctypes.c_int64(columns),
            None if weights is None else address(weights, ctypes.c_float),
        )
        return written

    threads = min(default_threads(), rows)
    with ThreadPoolExecutor(threads) as pool:
        written = sum(pool.map(convert, np.array_split(np.arange(rows), threads)))
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {kind.name}, expected {out.nbytes}")
    return out


def _importance_array(llama: Any, importance: Mapping[str, Float32]) -> Any:
    """llama.cpp's array of names and numbers, which an entry without a name ends (llama.h). It
    holds references to all that it points to."""
    if not hasattr(llama, "llama_model_imatrix_data"):  # older ones took a C++ map
        raise MobileVLMError(
            "the installed llama-cpp-python cannot be given an importance matrix: "
            "pip install -U llama-cpp-python"
        )
    array = (llama.llama_model_imatrix_data * (len(importance) + 1))()
    array.kept = []
    for entry, (name, values) in zip(array, importance.items(), strict=False):
        data = np.ascontiguousarray(values, np.float32)
        array.kept.append(data)
        entry.name, entry.size = name.encode(), data.size
        entry.data = address(data, ctypes.c_float)
    return array
