"""Distance of stored weights from those of the checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from mobilevlm.checkpoint import Weights
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.linear_groups import LinearGroup


def stacked(weights: Weights, group: LinearGroup) -> Float32:
    """Return the weights of a group as one product has them ``(out_size, in_size)``."""
    parts = [weights.read(f"{name}.weight", shape) for name, shape in group.shapes.items()]
    return np.concatenate(parts)


def weight_error(exact: Weights, stored: Weights, group: LinearGroup) -> float:
    """Return the relative error of the weights of a group."""
    return relative_error(stacked(stored, group), stacked(exact, group))


def relative_error(stored: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> float:
    """Return the Euclidean norm of the difference over that of the exact array; 0 for zeros."""
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(stored.astype(np.float32) - exact)) / norm if norm else 0.0
