"""llama.cpp through llama-cpp-python: loaded and kept quiet, models opened and freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

from mobilevlm.errors import BundleError, require
from mobilevlm.runtime.engines.onnx.forking import check_threads, free_with
from mobilevlm.waiting import waiting_asleep

LLAMA = "llama.cpp"
LOG_VARIABLE = "MOBILEVLM_LLAMA_LOG"
"""With this environment variable at 1, llama.cpp's log goes to stderr."""

_ERROR = 4
"""GGML_LOG_LEVEL_ERROR"""

_callbacks: list[Any] = []
"""The log callback; the libraries keep its address, so it must never be freed."""
_errors: deque[str] = deque(maxlen=4)
"""The last errors logged, without their line breaks."""


def llama_library(purpose: str = "running GGUF files") -> Any:
    """The module ``llama_cpp``. ``purpose``: what it is needed for, for the error.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or does not load.
    """
    try:
        with waiting_asleep():
            import llama_cpp
    except (ImportError, OSError, RuntimeError):
        raise require("llama-cpp-python", "gguf", purpose) from None
    return llama_cpp


def catch_log() -> None:
    """Keeps what the libraries log from now on off stderr, unless it was asked for."""
    llama_cpp = llama_library()
    from llama_cpp import mtmd_cpp

    if not _callbacks:
        _callbacks.append(llama_cpp.llama_log_callback(_write_log))
    # llama_log_set sets ggml's log too.
    for set_log in (
        llama_cpp.llama_log_set,
        mtmd_cpp.mtmd_log_set,
        mtmd_cpp.mtmd_helper_log_set,
    ):
        set_log(_callbacks[0], None)
    _errors.clear()


def _write_log(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        _errors.append(" ".join(text.decode(errors="replace").split()))
    if os.environ.get(LOG_VARIABLE) == "1":
        sys.stderr.write(text.decode(errors="replace"))


def load_error(path: Path) -> BundleError:
    """Return the error for a file that a library gave a null pointer for; it quotes the first of
    the errors logged (they go from the cause to its consequences)."""
    reason = _errors[0] if _errors else "no reason given"
    return BundleError(
        f"{path}: llama.cpp cannot load it: {reason:.200} ({LOG_VARIABLE}=1 tells more)"
    )


class NativeModel:
    """A llama_model. Freed when nothing refers to it any more: contexts hold it."""

    def __init__(self, path: Path) -> None:
        """``path``: a file whose header was checked.

        Raises:
            BundleError: llama.cpp cannot load it.
        """
        library = llama_library()
        check_threads(LLAMA)
        catch_log()
        library.llama_backend_init()
        options = library.llama_model_default_params()
        options.n_gpu_layers = 0  # every figure of this project is the processor's
        self.pointer = library.llama_model_load_from_file(os.fsencode(path), options)
        if not self.pointer:
            raise load_error(path)
        free_with(self, library.llama_model_free, self.pointer)


def address(array: Any, kind: Any) -> Any:
    """The data of a contiguous numpy array as a ctypes pointer. The caller keeps the array."""
    return array.ctypes.data_as(ctypes.POINTER(kind))
