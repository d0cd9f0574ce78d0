"""AWQ (Lin et al. 2023): weights that meet large activations are made larger, so that rounding them
costs less; what comes before the layer is made smaller by the same factors.

The factors are a power of the activations' size, and the power is the one of a grid that makes the
least error in the layers' output on the calibration data, as the paper has it. (Counting errors of
different inputs as independent is cheaper, and misleads: inputs go together.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mobilevlm.export.quantize import rtn
from mobilevlm.export.quantize.blocks import Float32, dequantize
from mobilevlm.export.quantize.gptq import weighted_error
from mobilevlm.recipe import Scheme

POWERS = tuple(step / 20 for step in range(20))
"""0 leaves everything as it is."""
ROWS = 512
"""Outputs per layer that the search looks at."""


def factors(
    weights: Sequence[Float32], mean_square: Float32, hessian: Float32, scheme: Scheme
) -> Float32:
    """Factors ``(in_size,)`` for the inputs of layers ``(out_size, in_size)`` that share them.

    ``mean_square``: of each input, ``(in_size,)``; where inputs must have the same factors, the
    same. ``hessian``: second moments of the inputs, ``(in_size, in_size)``. All ones where no power
    is better.
    """
    rows = np.concatenate([weight[:: max(1, len(weight) // ROWS)] for weight in weights])
    candidates = [_candidate(mean_square, power) for power in POWERS]
    errors = [_error(rows, candidate, hessian, scheme) for candidate in candidates]
    return candidates[int(np.argmin(errors))]


def _candidate(mean_square: Float32, power: float) -> Float32:
    """Sizes to this power, around 1; an input that never fires keeps 1."""
    alive = mean_square > 0
    logarithm = np.zeros(len(mean_square))
    logarithm[alive] = power / 2 * np.log(mean_square[alive].astype(np.float64))
    if alive.any():
        logarithm[alive] -= logarithm[alive].mean()
    found: Float32 = np.exp(logarithm.clip(-8, 8)).astype(np.float32)
    return found


def _error(rows: Float32, candidate: Float32, hessian: Float32, scheme: Scheme) -> float:
    restored = dequantize(rtn.quantize(rows * candidate, scheme)) / candidate
    return weighted_error(rows, restored, hessian)
