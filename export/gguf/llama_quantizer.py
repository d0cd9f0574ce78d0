"""The K-quants, made by llama.cpp's own quantizer (llama-cpp-python)."""

from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path
from typing import Any

from mobilevlm.errors import MobileVLMError, require
from mobilevlm.export.gguf.tensors import FILE_TYPES
from mobilevlm.spec import GGUFType


def load_llama(kind: GGUFType) -> Any:
    """The low-level module of llama-cpp-python.

    Raises:
        MissingExtraError: it is not installed, or does not load.
    """
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError):
        raise require("llama-cpp-python", "gguf", f"the type {kind}") from None
    return llama_cpp


def quantizer_version(kind: GGUFType) -> str:
    """Version of what makes a K-quant."""
    load_llama(kind)
    return importlib.metadata.version("llama-cpp-python")


def quantize_file(source: Path, target: Path, kind: GGUFType) -> None:
    """Writes a float16 GGUF file again in a K-quant. Rows that do not divide into its blocks of 256
    get a type with blocks of 32, as llama.cpp chooses.

    Raises:
        MobileVLMError: llama.cpp refuses.
    """
    llama = load_llama(kind)
    keep = llama.llama_log_callback(_silent)
    llama.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        params = llama.llama_model_quantize_default_params()
        params.ftype = int(FILE_TYPES[kind])
        status = llama.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params))
    finally:
        llama.llama_log_set(llama.llama_log_callback(), ctypes.c_void_p(0))
    if status != 0:
        raise MobileVLMError(f"{target.name}: llama.cpp could not quantize the decoder to {kind}")


def _silent(level: int, text: bytes, data: object) -> None:
    """llama.cpp reports every tensor."""
