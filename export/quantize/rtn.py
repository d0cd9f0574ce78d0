"""Round-to-nearest: each block or column gets the scale that covers its largest weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

INT8_LIMIT = 64
"""Largest 8-bit weight. Half the range: AVX2 without VNNI adds pairs of u8 × s8 products in 16
bits, and 2 · 255 · 64 is the most that fits."""

_LARGEST_SCALE = np.float32(np.finfo(np.float16).max)
_SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Smaller scales have no finite inverse; rounded to float16 they are zero anyway."""

_CHUNK = 2**24
"""Weights quantized at once, which bounds the memory of intermediate results."""


@dataclass(frozen=True)
class ColumnQuantized:
    """8-bit weights with one scale per output."""

    values: NDArray[np.int8]
    """``(in_size, out_size)``"""
    scales: Float32
    """``(out_size,)``"""
    relative_error: float


@dataclass(frozen=True)
class BlockQuantized:
    """Weights in blocks of ``block_size`` along the input, the zero point in mid-range."""

    packed: NDArray[np.uint8]
    """``(out_size, blocks, block_size * bits / 8)``; with 4 bits the even index is the low half."""
    scales: Float32
    """``(out_size, blocks)``, values that float16 holds exactly"""
    relative_error: float


def quantize_columns(weight: Float32) -> ColumnQuantized:
    """Symmetric 8-bit quantization of ``(out_size, in_size)``, one scale per output."""
    out_size, in_size = weight.shape
    values = np.empty((in_size, out_size), np.int8)
    scales = np.empty(out_size, np.float32)
    error = energy = 0.0
    for rows in _row_chunks(out_size, in_size):
        part = weight[rows]
        scale = np.abs(part).max(axis=1) / np.float32(INT8_LIMIT)
        scale[scale == 0] = 1.0
        rounded = np.rint(part / scale[:, None])
        values[:, rows], scales[rows] = rounded.astype(np.int8).T, scale
        error += float(np.square(rounded * scale[:, None] - part).sum(dtype=np.float64))
        energy += float(np.square(part).sum(dtype=np.float64))
    return ColumnQuantized(values, scales, _ratio(error, energy))


def quantize_blocks(weight: Float32, bits: int, block_size: int) -> BlockQuantized:
    """Block quantization of ``(out_size, in_size)`` to 4 or 8 bits.

    The scale has the sign of the block's largest weight, so that this weight uses the one more step
    that the negative side has; it is rounded to float16. With 4 bits and blocks of 32 the integers
    and scales are those of llama.cpp's Q4_0.
    """
    out_size, in_size = weight.shape
    blocks = -(-in_size // block_size)
    packed = np.empty((out_size, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((out_size, blocks), np.float32)
    error = energy = 0.0
    for rows in _row_chunks(out_size, in_size):
        part = weight[rows]
        if in_size % block_size:
            part = np.pad(part, ((0, 0), (0, blocks * block_size - in_size)))
        part = part.reshape(-1, blocks, block_size)
        codes, scale = _round_blocks(part, bits)
        packed[rows] = codes[..., 0::2] | (codes[..., 1::2] << 4) if bits == 4 else codes
        scales[rows] = scale
        restored = (codes.astype(np.float32) - np.float32(2 ** (bits - 1))) * scale[..., None]
        error += float(np.square(restored - part).sum(dtype=np.float64))
        energy += float(np.square(part).sum(dtype=np.float64))
    return BlockQuantized(packed, scales, _ratio(error, energy))


def _round_blocks(part: Float32, bits: int) -> tuple[NDArray[np.uint8], Float32]:
    """Codes ``(rows, blocks, block_size)`` and scales ``(rows, blocks)``."""
    middle = 2 ** (bits - 1)
    largest = np.take_along_axis(part, np.abs(part).argmax(axis=2)[..., None], axis=2)[..., 0]
    exact = (largest / np.float32(-middle)).clip(-_LARGEST_SCALE, _LARGEST_SCALE)
    inverse = np.divide(1, exact, out=np.zeros_like(exact), where=np.abs(exact) > _SMALLEST_SCALE)
    codes = (part * inverse[..., None] + np.float32(middle + 0.5)).clip(0, 2 * middle - 1)
    return codes.astype(np.uint8), exact.astype(np.float16).astype(np.float32)


def _row_chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _ratio(error: float, energy: float) -> float:
    return float(np.sqrt(error / energy)) if energy else 0.0
