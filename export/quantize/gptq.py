"""GPTQ (Frantar et al. 2022): error of one input's weights is made good by the inputs after it.

Minimises ``‖X W - X Ŵ‖``, where X are calibration activations, known by their second moments
(the Hessian ``Xᵀ X``). A column of weights is rounded; what that changed in the output is taken
back as far as it goes by the columns not yet rounded, along the Cholesky factor of the inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.export.quantize import hqq
from mobilevlm.export.quantize.blocks import (
    Float32,
    Quantized,
    Rows,
    encode,
    limited_scales,
    quantize_rows,
    stored_scales,
    to_blocks,
)
from mobilevlm.recipe import Scheme

Float64 = NDArray[np.float64]
HessianOf: TypeAlias = Callable[[str], Float32 | None]
"""``Xᵀ X`` up to a factor ``(in_size, in_size)`` of a layer's inputs, by its canonical name; none
where no token reached it."""

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean."""
PANEL = 128
"""Columns rounded before the rest of the weight follows."""
_CHUNK = 2**22
"""Weights quantized at once. Outputs do not depend on each other."""
_SMALL = 256
"""Edge of the triangles that are inverted at once."""


def quantize(
    weight: Float32, scheme: Scheme, hessian: Float32, *, act_order: bool = True
) -> Quantized:
    """Quantizes ``(out_size, in_size)``, given ``Xᵀ X`` up to a factor, ``(in_size, in_size)``.

    Scales and zero points are those of HQQ, which lose less than covering the largest weight.
    ``act_order``: inputs with the most energy first, each block with the scale that its weights had
    at the start; else in their order, where a block's scale is chosen when its turn comes.
    """
    energy = np.diag(hessian)
    in_size = len(energy)
    order = np.argsort(-energy, kind="stable") if act_order else np.arange(in_size)
    factor = _inverse_factor(hessian[np.ix_(order, order)])
    return quantize_rows(
        weight, scheme, lambda part: _quantize_part(part, scheme, order, factor, act_order), _CHUNK
    )


def no_hessian(name: str) -> Float32:
    """Where no layer is quantized by GPTQ."""
    raise LookupError(name)


def weighted_error(weight: Float32, restored: Float32, hessian: Float32) -> float:
    """``‖X W - X Ŵ‖² `` of ``(out_size, in_size)``, with the Hessian's factor."""
    error = (weight - restored).astype(np.float64)
    return float(((error @ hessian) * error).sum())


def _quantize_part(
    part: Float32, scheme: Scheme, order: NDArray[np.intp], factor: Float32, static: bool
) -> Rows:
    """``(rows, in_size)``; ``order`` and ``factor`` as in :func:`quantize`."""
    rows, in_size = part.shape
    blocks, block = scheme.blocks(in_size), scheme.block(in_size)
    scales, zeros = _scales(to_blocks(part, scheme), scheme)
    panel = block if PANEL < block < in_size else PANEL
    static = static or panel % block != 0
    codes = np.zeros((blocks * block, rows), np.uint8)
    codes[in_size:] = np.repeat(zeros.T, block, axis=0)[in_size:]
    left = np.ascontiguousarray(part.T[order])  # (in_size, rows), what is not rounded yet
    for start in range(0, in_size, panel):
        stop = min(start + panel, in_size)
        errors = np.empty((stop - start, rows), np.float32)
        for index in range(start, stop):
            column = order[index]
            home = column // block
            if not static and index % block == 0:
                group = to_blocks(np.ascontiguousarray(left[index : index + block].T), scheme)
                scales[:, home : home + 1], zeros[:, home : home + 1] = _scales(group, scheme)
            scale, zero = scales[:, home], zeros[:, home]
            code = encode(left[index][:, None, None], scale[:, None], zero[:, None], scheme)
            codes[column] = code[:, 0, 0]
            error = (left[index] - (codes[column] - zero) * scale) / factor[index, index]
            errors[index - start] = error
            left[index + 1 : stop] -= factor[index, index + 1 : stop, None] * error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    final = codes.T.reshape(rows, blocks, block)
    return Rows(final, scales, zeros.astype(np.uint8))


def _scales(part: Float32, scheme: Scheme) -> tuple[Float32, Float32]:
    scales, zeros = hqq.fit(part, scheme)
    return stored_scales(limited_scales(scales, scheme), scheme), zeros


def _inverse_factor(hessian: Float32) -> Float32:
    """The upper triangular U with ``Uᵀ U`` the inverse of the damped Hessian.

    Backwards, the lower Cholesky factor is an upper one, ``H = R Rᵀ``, and U the inverse of R.
    """
    matrix = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", matrix)
    diagonal += max(DAMPING * float(diagonal.mean()), np.finfo(np.float32).tiny)
    factor: Float64 = np.ascontiguousarray(np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1])
    return _inverse_upper(factor).astype(np.float32)


def _inverse_upper(matrix: Float64) -> Float64:
    """The inverse of an upper triangular matrix, in place, by quarters."""
    size = len(matrix)
    if size <= _SMALL:
        matrix[:] = np.triu(np.linalg.inv(matrix))
        return matrix
    half = size // 2
    upper, lower = _inverse_upper(matrix[:half, :half]), _inverse_upper(matrix[half:, half:])
    matrix[:half, half:] = -(upper @ (matrix[:half, half:] @ lower))
    return matrix
