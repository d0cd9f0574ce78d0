"""Half-quadratic quantization (Badri and Shaji 2023): scales and zero points that fit most weights
well and give up on outliers. Needs no data.

Minimises the sum of ``|error|^p`` with p < 1 by turns: a shrinkage takes the outliers of the error
out of the weights, then least squares fits scale and zero point to the rest. Errors are counted in
steps of the round-to-nearest scale, so that one set of constants suits every tensor.
"""

from __future__ import annotations

import numpy as np

from mobilevlm.export.quantize import rtn
from mobilevlm.export.quantize.blocks import (
    Codes,
    Float32,
    Quantized,
    encode,
    limited_scales,
    quantize_fitted,
    stored_scales,
)
from mobilevlm.recipe import Scheme

EXPONENT = 0.7
"""The p of the norm."""
SHARPNESS, GROWTH = 10.0, 1.01
"""Weight of the distance between an error and its shrunk one, and its growth in each turn."""
TURNS = 10
"""More of them lower the sum by a few percent, and raise the squared error."""


def quantize(weight: Float32, scheme: Scheme) -> Quantized:
    """Quantizes ``(out_size, in_size)``; no block has a larger error than round-to-nearest makes,
    as measured by the sum of ``|error|^p``."""
    return quantize_fitted(weight, scheme, fit)


def fit(part: Float32, scheme: Scheme) -> tuple[Float32, Float32]:
    """Scales and zero points ``(rows, blocks)`` of ``(rows, blocks, block)``."""
    start, zeros = rtn.fit(part, scheme)
    codes = encode(part, limited_scales(start, scheme), zeros, scheme)
    scales = best_scales = stored_scales(limited_scales(start, scheme), scheme)
    best_zeros = zeros
    step: Float32 = np.where(scales != 0, np.abs(scales), np.float32(1))[..., None]
    error: Float32 = _errors(part, codes, scales, zeros) / step
    power = _power(error)
    best = power.sum(axis=2)
    sharpness = np.float32(SHARPNESS)
    for _ in range(TURNS):
        outliers = _shrunk(error, power, sharpness)
        target = part - outliers * step
        scales, zeros = _least_squares(target, codes, scales, zeros, scheme)
        codes = encode(part, scales, zeros, scheme)
        error = _errors(part, codes, scales, zeros) / step
        power = _power(error)
        total = power.sum(axis=2)
        better = total < best
        best = np.where(better, total, best)
        best_scales = np.where(better, scales, best_scales)
        best_zeros = np.where(better, zeros, best_zeros)
        sharpness *= np.float32(GROWTH)
    return best_scales, best_zeros


def lp_error(weight: Float32, restored: Float32) -> float:
    """Sum of ``|error|^p``."""
    return float(_power(weight - restored).sum(dtype=np.float64))


def _errors(part: Float32, codes: Codes, scales: Float32, zeros: Float32) -> Float32:
    restored = codes.astype(np.float32)
    restored -= zeros[..., None]
    restored *= scales[..., None]
    return np.subtract(part, restored, out=restored)


def _power(error: Float32) -> Float32:
    """``|error|^p``, by way of the logarithm: numpy has fast ones."""
    size = np.abs(error)
    size += np.float32(1e-30)
    np.log(size, out=size)
    size *= np.float32(EXPONENT)
    return np.exp(size, out=size)


def _shrunk(error: Float32, power: Float32, sharpness: np.float32) -> Float32:
    """The generalised soft threshold: ``sign(e) · max(0, |e| - |e|^(p - 1) / sharpness)``."""
    size = np.abs(error)
    threshold = power / (sharpness * size + np.float32(1e-30))
    shrunk: Float32 = np.copysign((size - threshold).clip(min=0), error)
    return shrunk


def _least_squares(
    target: Float32, codes: Codes, scales: Float32, zeros: Float32, scheme: Scheme
) -> tuple[Float32, Float32]:
    """Scale and zero point nearest to ``target``; a block with one code only keeps its own."""
    levels = codes.astype(np.float32)
    if not scheme.symmetric:
        mean = target.mean(axis=2)
        centred = levels - levels.mean(axis=2, keepdims=True)
        slope = _ratio((centred * target).sum(axis=2), np.square(centred).sum(axis=2), scales)
        origin = levels.mean(axis=2) - _ratio(mean, slope, np.zeros_like(mean))
        zeros = np.rint(origin).clip(0, scheme.highest)
    levels -= zeros[..., None]
    scales = _ratio((levels * target).sum(axis=2), np.square(levels).sum(axis=2), scales)
    return stored_scales(limited_scales(scales, scheme), scheme), zeros


def _ratio(over: Float32, under: Float32, otherwise: Float32) -> Float32:
    return np.divide(over, under, out=otherwise.copy(), where=under != 0)
