"""SmoothQuant (Xiao et al. 2022): the outliers of activations move into the weights, where a scale
per output has room for them, so that one scale for all activations is enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mobilevlm.export.quantize.blocks import Float32

STRENGTH = 0.5
"""The paper's α: half of the range of each input goes to the weights."""


def factors(weights: Sequence[Float32], maximum: Float32) -> Float32:
    """Factors ``(in_size,)`` for the inputs of layers ``(out_size, in_size)`` that share them.

    ``maximum``: largest magnitude of each input, ``(in_size,)``. An input that never fires, or that
    no weight reads, keeps 1.
    """
    widest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    alive = (maximum > 0) & (widest > 0)
    found = np.ones(len(maximum), np.float32)
    found[alive] = maximum[alive] ** STRENGTH / widest[alive] ** (1 - STRENGTH)
    return found
