"""Mends the order of tokens in llama.cpp's graph of a CLIP tower.

Since May 2025 (ggml-org/llama.cpp, pull request 13321) that graph puts the class token behind the
patches, while the positions and the rows that the projector takes are still counted as if it stood
before them. Each patch gets its neighbour's position, the first patch is lost, and the class token
goes to the language model as the last patch: a quarter to a half of the visual tokens' norm is
wrong. The graph's evaluation callback sees both lists before they are used; here they are put in
order. Where the class token stands first nothing is touched.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

_CONCAT_AXIS = 1
"""The class token joins the patches along the positions."""


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` (ggml.h)."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def class_token_order() -> Any:
    """A callback for ``mtmd_context_params.cb_eval``; keep it as long as the context."""
    from llama_cpp import llama_cpp
    from llama_cpp._ggml import libggml

    name_of = libggml.ggml_get_name
    name_of.argtypes, name_of.restype = [ctypes.c_void_p], ctypes.c_char_p
    op_of = libggml.ggml_op_desc
    op_of.argtypes, op_of.restype = [ctypes.c_void_p], ctypes.c_char_p
    behind = False
    """True if the class token of the graph under evaluation stands behind the patches."""

    def observe(pointer: int, ask: bool, data: object) -> bool:
        nonlocal behind
        tensor = ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents
        if not ask or tensor.name != name_of(pointer):  # another layout than the one above
            return False
        operation = op_of(pointer)
        if operation == b"CONCAT" and tensor.op_params[0] == _CONCAT_AXIS:
            first, second = tensor.src[0].contents, tensor.src[1].contents
            behind = second.ne[1] == 1 and first.ne[1] > 1
        elif operation == b"GET_ROWS" and behind:
            _reorder(tensor.src[1].contents)
        return False

    return llama_cpp.ggml_backend_sched_eval_callback(observe)


def _reorder(rows: _Tensor) -> None:
    """Rewrites the list of positions ``0 … n`` or of patches ``1 … n``."""
    count = rows.ne[0]
    if rows.name not in (b"positions", b"patches"):
        return
    values = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(rows.data))
    if rows.name == b"positions" and values[0] == 0:
        values[:] = [*range(1, count), 0]
    elif rows.name == b"patches" and values[0] == 1:
        values[:] = range(count)
