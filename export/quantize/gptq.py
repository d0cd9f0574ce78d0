"""GPTQ (Frantar et al. 2022): error of one input's weights is made good by the inputs after it.

Minimises ``‖X W - X Ŵ‖``, where X are calibration activations, known by their second moments
(the Hessian ``Xᵀ X``). A column of weights is rounded; what that changed in the output is taken
back as far as it goes by the columns not yet rounded, along the Cholesky factor of the inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.export.quantize import mse
from mobilevlm.export.quantize.blocks import (
    SMALLEST_SCALE,
    Float32,
    Quantized,
    Rows,
    limited_scales,
    quantize_rows,
    stored_scales,
)
from mobilevlm.recipe import Scheme

HessianOf: TypeAlias = Callable[[str], Float32 | None]
"""``Xᵀ X`` up to a factor ``(in_size, in_size)`` of a layer's inputs, by its canonical name; none
where no token reached it."""

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean."""
PANEL, STRIP = 128, 16
"""Inputs rounded before the next ones follow."""
TURNS = 1
"""Each takes about as long as the rounding in order, and lowers the error by several percent; none
is made for weights of 8 bits, whose error is small."""
_CHUNK = 2**22
"""Weights quantized at once. Outputs do not depend on each other."""
_SMALL = 256
"""Edge of the matrices that LAPACK factors."""


def quantize(weight: Float32, scheme: Scheme, hessian: Float32, *, turns: int = TURNS) -> Quantized:
    """Quantize ``(out_size, in_size)``, given ``Xᵀ X`` up to a factor, ``(in_size, in_size)``.

    Inputs with the most energy come first. Each block has the scale and zero point that make the
    least error where an error of an input counts what is left of it after others make it good.
    ``turns``: how often scales and codes are improved after that.
    """
    damped = _damped(hessian)
    order = np.argsort(-np.diag(damped), kind="stable")
    factor = _inverse_factor(damped[np.ix_(order, order)])
    remaining = np.diag(factor).copy()
    factor /= remaining[:, None]
    importance = np.empty_like(remaining)
    importance[order] = (remaining.min() / remaining) ** 2

    def quantize_part(part: Float32) -> Rows:
        scales, zeros = mse.fit_rows(part, scheme, importance)
        grid = _Grid.of(scales, zeros, scheme)
        weights = np.ascontiguousarray(part.T)
        levels = _round_in_order(weights, grid, order, factor)
        if scheme.block_size is not None and scheme.bits < 8:
            for _ in range(turns):
                _improve(weights, levels, grid, damped)
        return grid.rows(levels)

    return quantize_rows(weight, scheme, quantize_part, _CHUNK)


def no_hessian(name: str) -> Float32:
    """Raise LookupError; stands in for Hessians where no layer is quantized by GPTQ."""
    raise LookupError(name)


def weighted_error(weight: Float32, restored: Float32, hessian: Float32) -> float:
    """``‖X W - X Ŵ‖² `` of ``(out_size, in_size)``, with the Hessian's factor."""
    error = (weight - restored).astype(np.float64)
    return float(((error @ hessian) * error).sum())


@dataclass(frozen=True)
class _Grid:
    """Scales and zero points of some outputs, inputs first."""

    scheme: Scheme
    scales: Float32
    """``(blocks, rows)``"""
    zeros: Float32
    """``(blocks, rows)``"""
    inverse: Float32
    """1 over the scales; 0 where there is none"""
    lowest: Float32
    """Least code less the zero point ``(blocks, rows)``"""
    highest: Float32
    """Largest code less the zero point ``(blocks, rows)``"""

    @classmethod
    def of(cls, scales: Float32, zeros: Float32, scheme: Scheme) -> _Grid:
        """``scales`` and ``zeros``: ``(rows, blocks)``."""
        step, middle = np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T)
        lowest, highest = scheme.lowest - middle, scheme.highest - middle
        grid = cls(scheme, step, middle, np.empty_like(step), lowest, highest)
        for index, row in enumerate(step):
            grid.set_scale(index, row)
        return grid

    def set_scale(self, index: int, scale: Float32) -> None:
        """Give a block other scales ``(rows,)``."""
        self.scales[index] = scale
        usable = np.abs(scale) > SMALLEST_SCALE
        self.inverse[index] = np.divide(1, scale, out=np.zeros_like(scale), where=usable)

    def round(self, weights: Float32, index: int, out: Float32) -> None:
        """Nearest levels ``(rows,)``, codes less the zero point, of one input in a block."""
        np.multiply(weights, self.inverse[index], out=out)
        np.rint(out, out=out)
        np.maximum(out, self.lowest[index], out=out)
        np.minimum(out, self.highest[index], out=out)

    def rows(self, levels: Float32) -> Rows:
        """Codes of levels ``(in_size, rows)``."""
        blocks, rows = self.scales.shape
        block = self.scheme.block(len(levels))
        codes = np.repeat(self.zeros, block, axis=0)  # of padding: the zero point
        codes[: len(levels)] += levels
        final = np.ascontiguousarray(codes.T.astype(np.uint8)).reshape(rows, blocks, block)
        scales = np.ascontiguousarray(self.scales.T)
        return Rows(final, scales, np.ascontiguousarray(self.zeros.T).astype(np.uint8))


def _round_in_order(
    weights: Float32, grid: _Grid, order: NDArray[np.intp], factor: Float32
) -> Float32:
    """Return levels ``(in_size, rows)`` of weights ``(in_size, rows)``, rounded input by input.
    ``factor``: upper triangular with ones on the diagonal; a row holds what an input's error takes
    from those after it.

    Errors of a panel reach the inputs after it when their panel begins, and those of a strip the
    rest of the panel when the next strip begins: nearly all the work is products of matrices.
    """
    in_size = len(weights)
    home = order // grid.scheme.block(in_size)
    left = weights[order]  # with the errors to make good
    errors, levels = np.empty_like(left), np.empty_like(left)
    for panel in range(0, in_size, PANEL):
        panel_stop = min(panel + PANEL, in_size)
        left[panel:panel_stop] -= factor[:panel, panel:panel_stop].T @ errors[:panel]
        for strip in range(panel, panel_stop, STRIP):
            stop = min(strip + STRIP, panel_stop)
            left[strip:stop] -= factor[panel:strip, strip:stop].T @ errors[panel:strip]
            for index in range(strip, stop):
                level, error = levels[index], errors[index]
                grid.round(left[index], home[index], level)
                np.multiply(level, grid.scales[home[index]], out=error)
                np.subtract(left[index], error, out=error)
                left[index + 1 : stop] -= factor[index, index + 1 : stop, None] * error
    found = np.empty_like(levels)
    found[order] = levels
    return found


def _improve(weights: Float32, levels: Float32, grid: _Grid, hessian: Float32) -> None:
    """Take blocks in turn: the best scale for the block's levels, then the best level of each
    input, all else as it is. Neither makes the error larger. Changes ``levels`` ``(in_size, rows)``
    and ``grid``.
    """
    in_size, block = len(weights), grid.scheme.block(len(weights))
    error = weights - levels * np.repeat(grid.scales, block, axis=0)[:in_size]
    panel = max(1, PANEL // block) * block
    for first in range(0, in_size, panel):
        last = min(first + panel, in_size)
        pulls = hessian[first:last] @ error
        for start in range(first, last, block):
            here = slice(start, min(start + block, last))
            within = hessian[here, here]
            change = _improve_block(levels[here], grid, start // block, pulls[:block], within)
            error[here] -= change
            pulls = pulls[block:] - hessian[here.stop : last, here] @ change


def _improve_block(
    level: Float32, grid: _Grid, index: int, pull: Float32, within: Float32
) -> Float32:
    """Improve the levels and scale of one block, and return the change of its weights ``(block,
    rows)``. ``pull``: product of the block's rows of the Hessian and the whole error, which is
    overwritten; ``within``: the Hessian of the block's own inputs.
    """
    steepness = (level * (within @ level)).sum(axis=0)
    ratio = (level * pull).sum(axis=0)
    change = np.divide(ratio, steepness, out=np.zeros_like(ratio), where=steepness > 0)
    old = grid.scales[index]
    scale = stored_scales(limited_scales(old + change, grid.scheme), grid.scheme)
    moved = level * (scale - old)
    grid.set_scale(index, scale)
    diagonal = np.diag(within)[:, None]
    pull -= within @ moved
    pull /= diagonal
    within = within / diagonal
    changes = np.empty_like(level)
    for strip in range(0, len(level), STRIP):
        stop = min(strip + STRIP, len(level))
        pull[strip:stop] -= within[strip:stop, :strip] @ changes[:strip]
        for place in range(strip, stop):
            before = level[place] * scale
            grid.round(before + pull[place], index, level[place])
            np.multiply(level[place], scale, out=changes[place])
            changes[place] -= before
            pull[place + 1 : stop] -= within[place + 1 : stop, place, None] * changes[place]
    changes += moved
    return changes


def _damped(hessian: Float32) -> Float32:
    """Return the Hessian over its mean diagonal, with the damping."""
    mean = float(np.diag(hessian).mean())
    damped = hessian / np.float32(mean) if mean > 0 else np.zeros_like(hessian)
    np.einsum("ii->i", damped)[:] += np.float32(DAMPING)
    return damped


def _inverse_factor(matrix: Float32) -> Float32:
    """Return the upper triangular U with ``Uᵀ U`` the inverse of the matrix.

    Damping leaves most matrices well enough conditioned for float32, which takes half the time.
    """
    try:
        factor: Float32 = _inverse_by_quarters(matrix)
    except np.linalg.LinAlgError:
        factor = _inverse_by_quarters(matrix.astype(np.float64)).astype(np.float32)
    return factor


def _inverse_by_quarters(matrix: NDArray[Any]) -> NDArray[Any]:
    """Return U of :func:`_inverse_factor`, the inverse of the upper triangular R in ``R Rᵀ``,
    the matrix: nearly all the work is products, several times faster than LAPACK's factor.

    Backwards, the lower Cholesky factor is an upper one.
    """
    size = len(matrix)
    if size <= _SMALL:
        factor = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
        return np.triu(np.linalg.inv(np.ascontiguousarray(factor)))
    half = size // 2
    inverse = np.zeros_like(matrix)
    last = inverse[half:, half:] = _inverse_by_quarters(matrix[half:, half:])
    corner = matrix[:half, half:] @ last.T  # the quarter of R on the right
    first = inverse[:half, :half] = _inverse_by_quarters(matrix[:half, :half] - corner @ corner.T)
    inverse[:half, half:] = -(first @ corner) @ last
    return inverse
