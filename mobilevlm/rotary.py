"""Rotary position embeddings as tables, for graphs and for what drives them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.spec import DecoderSpec

Float32: TypeAlias = NDArray[np.float32]


def rotary_tables(spec: DecoderSpec, sliding: bool = False) -> tuple[Float32, Float32]:
    """Cosine and sine ``(context_length, rotary_channels / 2)``, in float32 as in the reference
    code. ``sliding``: of the sliding layers' own base."""
    theta, scaling = spec.rope(sliding)
    channels = spec.rotary_channels
    exponent = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    frequency = (np.float32(1) / np.float32(theta) ** exponent).astype(np.float32)
    positions = np.arange(spec.context_length, dtype=np.float32) / np.float32(scaling)
    angle = np.outer(positions, frequency).astype(np.float32)
    return np.cos(angle), np.sin(angle)
