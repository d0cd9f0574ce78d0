"""Scales and zero points that make the least squared error, found by search. Needs no data; with
importances of the inputs (their mean squares) it makes the least error in the layer's output, if
inputs are independent.

Each block tries ranges from that of all its weights down to a part of it, clipped at either side.
For the codes of a range, the best scale follows in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mobilevlm.export.quantize.blocks import (
    CHUNK,
    SMALLEST_SCALE,
    Float32,
    Quantized,
    limited_scales,
    quantize_fitted,
    stored_scales,
    to_blocks,
)
from mobilevlm.plan import default_threads
from mobilevlm.recipe import Scheme

MOST_CLIPPED = {2: 0.66, 3: 0.48, 4: 0.36, 8: 0.12}
"""Largest share of a block's range that is clipped, by the bits of codes."""
STEPS = 6
"""Shares that are tried with zero points, besides none; twice as many without."""
SIDES = (0.0, 0.5, 1.0)
"""Share of the clipping that is below."""


def quantize(weight: Float32, scheme: Scheme) -> Quantized:
    """Quantize ``(out_size, in_size)``."""
    return quantize_fitted(weight, scheme, fit)


def fit(
    part: Float32, scheme: Scheme, importance: Float32 | None = None
) -> tuple[Float32, Float32]:
    """Return scales and zero points ``(rows, blocks)`` of ``(rows, blocks, block)``.

    ``importance``: what a squared error of each input's weights counts, ``(blocks, block)``; all
    the same by default.
    """
    root = None if importance is None else np.sqrt(importance)
    target = part if root is None else part * root
    highest_gain = np.full(part.shape[:2], -1, np.float32)
    best_scales = np.zeros_like(highest_gain)
    best_zeros = np.full_like(highest_gain, scheme.middle)
    for scales, zeros in _candidates(part, scheme):
        levels = _levels(part, scales, zeros, scheme)
        if root is not None:
            levels *= root
        # ‖target - scale · levels‖² is least at product / squares, and by product² / squares less
        # than ‖target‖².
        product = np.einsum("rbi,rbi->rb", levels, target)
        squares = np.einsum("rbi,rbi->rb", levels, levels)
        factor = np.divide(product, squares, out=np.zeros_like(product), where=squares > 0)
        gain = product * factor
        better = gain > highest_gain
        np.copyto(highest_gain, gain, where=better)
        np.copyto(best_scales, factor, where=better)
        np.copyto(best_zeros, zeros, where=better)
    return stored_scales(limited_scales(best_scales, scheme), scheme), best_zeros


def fit_rows(weight: Float32, scheme: Scheme, importance: Float32) -> tuple[Float32, Float32]:
    """Return the same for ``(out_size, in_size)``, in threads; ``importance``: ``(in_size,)``."""
    blocked = to_blocks(importance[None], scheme)[0]
    step = max(1, CHUNK // weight.shape[1])

    def make(start: int) -> tuple[Float32, Float32]:
        return fit(to_blocks(weight[start : start + step], scheme), scheme, blocked)

    with ThreadPoolExecutor(default_threads()) as pool:
        scales, zeros = zip(*pool.map(make, range(0, len(weight), step)), strict=True)
    return np.concatenate(scales), np.concatenate(zeros)


def _candidates(part: Float32, scheme: Scheme) -> Iterator[tuple[Float32, Float32]]:
    """Yield scales and zero points ``(rows, blocks)`` to try."""
    least, most = part.min(axis=2).clip(max=0), part.max(axis=2).clip(min=0)
    if scheme.symmetric:
        largest: Float32 = np.where(most > -least, most, least)
        scales = largest / np.float32(scheme.lowest - scheme.middle)
        if scheme.half_range:
            scales = np.abs(scales)
        zeros = np.full_like(scales, scheme.middle)
        # A wider range than the largest weight's may fit the others better.
        for step in range(-2, 2 * STEPS + 1):
            share = MOST_CLIPPED[scheme.bits] * step / (2 * STEPS)
            yield scales * np.float32(1 - share), zeros
        return
    steps = np.float32(scheme.highest)
    scales = most / steps - least / steps
    yield scales, _zeros(least, scales, scheme)
    for step in range(1, STEPS + 1):
        share = MOST_CLIPPED[scheme.bits] * step / STEPS
        clipped = scales * np.float32(1 - share)
        for side in SIDES:
            cut = least + scales * (steps * np.float32(share * side))
            yield clipped, _zeros(cut, clipped, scheme)


def _zeros(least: Float32, scales: Float32, scheme: Scheme) -> Float32:
    zeros = np.divide(-least, scales, out=np.zeros_like(least), where=scales > 0)
    return np.rint(zeros).clip(0, scheme.highest)


def _levels(part: Float32, scales: Float32, zeros: Float32, scheme: Scheme) -> Float32:
    """Return the nearest codes less the zero point ``(rows, blocks, block)``."""
    usable = np.abs(scales) > SMALLEST_SCALE
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=usable)
    levels: Float32 = part * inverse[..., None]
    np.rint(levels, out=levels)
    np.maximum(levels, (scheme.lowest - zeros)[..., None], out=levels)
    np.minimum(levels, (scheme.highest - zeros)[..., None], out=levels)
    return levels
