"""Rotary position embeddings as tables, for graphs and for what drives them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec

Float32: TypeAlias = NDArray[np.float32]


def rotary_tables(spec: DecoderSpec, sliding: bool = False) -> tuple[Float32, Float32]:
    """Cosine and sine ``(context_length, rotary_channels / 2)``, in float32 as in the reference
    code. ``spec``: that of a layer (:meth:`DecoderSpec.at`) where they differ; ``sliding``: of the
    sliding layers' own base."""
    theta, scaling = spec.rope(sliding)
    positions = np.arange(spec.context_length, dtype=np.float32) / np.float32(scaling)
    angle = np.outer(positions, frequencies(spec, theta)).astype(np.float32)
    return np.cos(angle), np.sin(angle)


def rotary_at(spec: DecoderSpec, positions: NDArray[np.int64]) -> tuple[Float32, Float32]:
    """Cosine and sine ``(length, rotary_channels / 2)`` of positions ``(axes, length)``."""
    turning = positions[pair_axes(spec)].T.astype(np.float32) / np.float32(spec.rope_scaling)
    angle = np.ascontiguousarray(turning * frequencies(spec, spec.rope_theta))
    return np.cos(angle), np.sin(angle)


def pair_axes(spec: DecoderSpec) -> NDArray[np.int64]:
    """Return the axis whose position turns each pair of channels ``(rotary_channels / 2,)``."""
    sections = spec.rope_sections
    axes = np.repeat(np.arange(len(sections)), sections)
    if spec.rope_interleaved:
        axes = np.zeros_like(axes)
        for axis, count in enumerate(sections[1:], 1):
            axes[axis : count * len(sections) : len(sections)] = axis
    return axes


def frequencies(spec: DecoderSpec, theta: float) -> Float32:
    """Radians of each pair of channels for a step of 1 ``(rotary_channels / 2,)``. ``theta``: as of
    :meth:`DecoderSpec.rope`."""
    channels = spec.rotary_channels
    exponent = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    frequencies: Float32 = (np.float32(1) / np.float32(theta) ** exponent).astype(np.float32)
    if spec.turned_pairs is not None:
        frequencies[spec.turned_pairs :] = 0
    return frequencies
