"""llama.cpp's Q4_0 and our 4-bit blocks: the same integers and scales in another order.

Q4_0 keeps for 32 weights a float16 scale, then 16 bytes that hold elements i and i + 16; ours
(MatMulNBits) hold elements 2 i and 2 i + 1, with the scales in an array of their own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mobilevlm.export.quantize import blocks
from mobilevlm.export.quantize.blocks import Quantized
from mobilevlm.recipe import Scheme

BLOCK = 32
BLOCK_BYTES = 2 + BLOCK // 2
SCHEME = Scheme(4, BLOCK)


def pack(quantized: Quantized) -> NDArray[np.uint8]:
    """``(out_size, blocks * 18)`` of blocks of 32."""
    codes = blocks.unpack(quantized.packed, 4, BLOCK)
    data = np.empty((*codes.shape[:2], BLOCK_BYTES), np.uint8)
    data[..., :2] = quantized.scales.astype("<f2")[..., None].view(np.uint8)
    data[..., 2:] = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return data.reshape(len(codes), -1)


def unpack(data: NDArray[np.uint8]) -> Quantized:
    """Undoes :func:`pack`; nothing is rounded, so the error is 0."""
    stored = data.reshape(len(data), -1, BLOCK_BYTES)
    scales = np.ascontiguousarray(stored[..., :2]).view("<f2")[..., 0].astype(np.float32)
    codes = np.concatenate([stored[..., 2:] & 15, stored[..., 2:] >> 4], axis=-1)
    in_size = scales.shape[1] * BLOCK
    return Quantized(SCHEME, in_size, blocks.pack(codes, 4), scales, None, 0.0)
