"""Round-to-nearest: each block gets the scale that covers its largest weight. Needs no data."""

from __future__ import annotations

import numpy as np

from mobilevlm.export.quantize.blocks import Float32, Quantized, quantize_fitted
from mobilevlm.recipe import Scheme


def quantize(weight: Float32, scheme: Scheme) -> Quantized:
    """Quantizes ``(out_size, in_size)``.

    With 4 bits, symmetric, in blocks of 32 the integers and scales are those of llama.cpp's Q4_0.
    """
    return quantize_fitted(weight, scheme, fit)


def fit(part: Float32, scheme: Scheme) -> tuple[Float32, Float32]:
    """Scales and zero points ``(rows, blocks)`` that cover ``(rows, blocks, block)``.

    Symmetric: the scale has the sign of the block's largest weight, so that this weight uses the
    one more step that the negative side has. Asymmetric: the range from least to largest weight,
    zero always in it.
    """
    if not scheme.symmetric:
        steps = np.float32(scheme.highest)
        least = part.min(axis=2).clip(max=0)
        scales = part.max(axis=2).clip(min=0) / steps - least / steps
        zeros = np.divide(-least, scales, out=np.zeros_like(least), where=scales > 0)
        return scales, np.rint(zeros).clip(0, scheme.highest)
    largest = np.take_along_axis(part, np.abs(part).argmax(axis=2)[..., None], axis=2)[..., 0]
    scales = largest / np.float32(scheme.lowest - scheme.middle)
    if scheme.half_range:  # both sides have as many steps
        scales = np.abs(scales)
    return scales, np.full_like(scales, scheme.middle)
