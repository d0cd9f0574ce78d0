"""Parts that all quantizers share: the integers that stand for weights, and how they are packed.

A weight is ``scale · (code - zero point)``. A block of weights along the input shares a scale and a
zero point; the bytes are those of ONNX Runtime's MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.plan import default_threads
from mobilevlm.recipe import Scheme

Float32: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.uint8]

_LARGEST_SCALE = np.float32(np.finfo(np.float16).max)
SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Smaller scales have no finite inverse; rounded to float16 they are zero anyway."""

CHUNK = 2**18
"""Weights quantized at once: intermediate results stay in the processor's cache."""


INT8 = Scheme(8, None, half_range=True)
"""Weights that meet 8-bit activations: one scale per output."""


@dataclass(frozen=True)
class Rows:
    """Some outputs of a layer, quantized and not yet packed."""

    codes: Codes
    """``(rows, blocks, block)``"""
    scales: Float32
    """``(rows, blocks)``"""
    zero_points: Codes
    """``(rows, blocks)``"""


@dataclass(frozen=True)
class Quantized:
    """A weight ``(out_size, in_size)`` as packed integers."""

    scheme: Scheme
    in_size: int
    packed: Codes
    """``(out_size, blocks, block * bits / 8)``, the first code in the lowest bits"""
    scales: Float32
    """``(out_size, blocks)``, values that float16 holds exactly unless a block is a whole row"""
    zero_points: Codes | None
    """``(out_size, blocks * bits / 8)`` packed in the same way; none where symmetric"""
    relative_error: float
    """Error of the whole weight, as a ratio of Euclidean norms"""


RowQuantizer: TypeAlias = Callable[[Float32], Rows]
"""Quantizes ``(rows, in_size)``."""
Fit: TypeAlias = Callable[[Float32, Scheme], tuple[Float32, Float32]]
"""Chooses scales and zero points, both ``(rows, blocks)``, for ``(rows, blocks, block)``."""


def quantize_rows(
    weight: Float32, scheme: Scheme, quantizer: RowQuantizer, chunk: int = CHUNK, threads: int = 1
) -> Quantized:
    """Quantizes ``(out_size, in_size)``, in each thread about ``chunk`` weights at a time, and
    packs them."""
    out_size, in_size = weight.shape
    blocks, block = scheme.blocks(in_size), scheme.block(in_size)
    packed = np.empty((out_size, blocks, packed_size(block, scheme.bits)), np.uint8)
    scales = np.empty((out_size, blocks), np.float32)
    zero_points = np.empty((out_size, packed_size(blocks, scheme.bits)), np.uint8)
    step = max(1, chunk // in_size)

    def make(start: int) -> tuple[float, float]:
        """Fills in a chunk; squared error, and squares of its weights."""
        part = weight[start : start + step]
        rows = quantizer(part)
        here = slice(start, start + len(part))
        packed[here] = pack(rows.codes, scheme.bits)
        scales[here] = rows.scales
        zero_points[here] = pack(rows.zero_points, scheme.bits)
        squares = np.square(_values(rows, in_size) - part), np.square(part)
        error, energy = (float(square.sum(dtype=np.float64)) for square in squares)
        return error, energy

    starts = range(0, out_size, step)
    if threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(threads) as pool:
            sums = list(pool.map(make, starts))
    else:
        sums = list(map(make, starts))
    error, energy = (sum(parts) for parts in zip(*sums, strict=True))
    return Quantized(
        scheme,
        in_size,
        packed,
        scales,
        None if scheme.symmetric else zero_points,
        float(np.sqrt(error / energy)) if energy else 0.0,
    )


def quantize_fitted(weight: Float32, scheme: Scheme, fit: Fit) -> Quantized:
    """Quantizes ``(out_size, in_size)``, each block by its own scale and zero point."""

    def quantizer(part: Float32) -> Rows:
        blocked = to_blocks(part, scheme)
        exact, zeros = fit(blocked, scheme)
        scales = limited_scales(exact, scheme)
        codes = encode(blocked, scales, zeros, scheme)
        return Rows(codes, stored_scales(scales, scheme), zeros.astype(np.uint8))

    return quantize_rows(weight, scheme, quantizer, threads=default_threads())


def dequantize(quantized: Quantized) -> Float32:
    """The weights ``(out_size, in_size)`` that the integers stand for."""
    scheme, blocks = quantized.scheme, quantized.scales.shape[1]
    codes = unpack(quantized.packed, scheme.bits, scheme.block(quantized.in_size))
    if quantized.zero_points is None:
        zeros = np.full(quantized.scales.shape, scheme.middle, np.uint8)
    else:
        zeros = unpack(quantized.zero_points, scheme.bits, blocks)
    return _values(Rows(codes, quantized.scales, zeros), quantized.in_size)


def signed_columns(quantized: Quantized) -> NDArray[np.int8]:
    """8-bit integers ``(in_size, out_size)`` around zero, as DynamicQuantizeMatMul takes them."""
    rows = quantized.packed.reshape(len(quantized.packed), -1)[:, : quantized.in_size]
    return np.ascontiguousarray((rows ^ 0x80).view(np.int8).T)


def half_scales(quantized: Quantized) -> NDArray[np.float16]:
    """Return the scales of blocks as files hold them ``(out_size, blocks)``, which is exact. ONNX
    Runtime makes them float32 when it loads them."""
    return quantized.scales.astype(np.float16)


def to_blocks(part: Float32, scheme: Scheme) -> Float32:
    """``(rows, in_size)`` to ``(rows, blocks, block)``, padded with zeros."""
    in_size = part.shape[1]
    blocks, block = scheme.blocks(in_size), scheme.block(in_size)
    if in_size % block:
        part = np.pad(part, ((0, 0), (0, blocks * block - in_size)))
    return part.reshape(-1, blocks, block)


def encode(part: Float32, scales: Float32, zeros: Float32, scheme: Scheme) -> Codes:
    """The nearest codes of ``(rows, blocks, block)``; scales and zeros ``(rows, blocks)``."""
    usable = np.abs(scales) > SMALLEST_SCALE
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=usable)
    codes = part * inverse[..., None] + (zeros + np.float32(0.5))[..., None]
    return codes.clip(scheme.lowest, scheme.highest, out=codes).astype(np.uint8)


def limited_scales(scales: Float32, scheme: Scheme) -> Float32:
    """Scales that the file's type can hold; a whole row of nothing gets 1."""
    if scheme.block_size is None:
        return np.where(np.abs(scales) > SMALLEST_SCALE, scales, np.float32(1))
    return scales.clip(-_LARGEST_SCALE, _LARGEST_SCALE)


def stored_scales(scales: Float32, scheme: Scheme) -> Float32:
    """Limited scales as a file holds them: float16 where a block is less than a row."""
    return scales if scheme.block_size is None else scales.astype(np.float16).astype(np.float32)


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` codes."""
    return -(-count * bits // 8)


def pack(codes: Codes, bits: int) -> Codes:
    """``(…, count)`` codes of ``bits`` bits to ``(…, packed_size)`` bytes, lowest bits first."""
    count = codes.shape[-1]
    if bits == 8:
        return codes
    if count % 8:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -count % 8)])
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), "<u4")
    for index in range(8):
        words |= codes[..., index::8].astype("<u4") << np.uint32(bits * index)
    data = words[..., None].view(np.uint8)[..., :bits]
    return data.reshape(*codes.shape[:-1], -1)[..., : packed_size(count, bits)]


def unpack(packed: Codes, bits: int, count: int) -> Codes:
    """Undoes :func:`pack`."""
    if bits == 8:
        return packed
    groups = -(-count // 8)
    data = np.zeros((*packed.shape[:-1], groups * bits), np.uint8)
    data[..., : packed.shape[-1]] = packed
    words = np.zeros((*packed.shape[:-1], groups, 4), np.uint8)
    words[..., :bits] = data.reshape(*packed.shape[:-1], groups, bits)
    joined, mask = words.view("<u4")[..., 0], np.uint32(2**bits - 1)
    codes = np.empty((*joined.shape, 8), np.uint8)
    for index in range(8):
        codes[..., index] = joined >> np.uint32(bits * index) & mask
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


def _values(rows: Rows, in_size: int) -> Float32:
    """Weights ``(rows, in_size)``."""
    centred = rows.codes.astype(np.float32) - rows.zero_points[..., None]
    values = centred * rows.scales[..., None]
    return values.reshape(len(values), -1)[:, :in_size]
