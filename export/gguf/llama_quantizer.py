"""The K-quants, made by llama.cpp's own quantizer (llama-cpp-python)."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from pathlib import Path

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.gguf.tensors import FILE_TYPES
from mobilevlm.runtime.engines.llama_native import catch_log, llama_library
from mobilevlm.runtime.machine import default_threads
from mobilevlm.spec import GGUFType


def quantizer_version(kind: GGUFType) -> str:
    """Version of what makes a K-quant.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or does not load.
    """
    llama_library(f"the type {kind}")
    return importlib.metadata.version("llama-cpp-python")


def quantize_file(source: Path, target: Path, kind: GGUFType) -> None:
    """Writes a float16 GGUF file again in a K-quant. Rows that do not divide into its blocks of 256
    get a type with blocks of 32, as llama.cpp chooses.

    Raises:
        MobileVLMError: llama.cpp refuses.
    """
    llama = llama_library(f"the type {kind}")
    catch_log()
    params = llama.llama_model_quantize_default_params()
    params.ftype = int(FILE_TYPES[kind])
    params.nthread = default_threads()
    status = llama.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    if status != 0:
        raise MobileVLMError(f"{target}: llama.cpp could not quantize the decoder to {kind}")
