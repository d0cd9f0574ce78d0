"""llama.cpp's Q4_0 and our 4-bit blocks: the same integers and scales in another order.

Q4_0 keeps for 32 weights a float16 scale, then 16 bytes that hold elements i and i + 16; ours
(MatMulNBits) hold elements 2 i and 2 i + 1, with the scales in an array of their own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mobilevlm.export.quantize.rtn import BlockQuantized

BLOCK = 32
BLOCK_BYTES = 2 + BLOCK // 2


def pack(quantized: BlockQuantized) -> NDArray[np.uint8]:
    """``(out_size, blocks * 18)`` of blocks of 32."""
    packed = quantized.packed
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], BLOCK)
    data = np.empty((*packed.shape[:2], BLOCK_BYTES), np.uint8)
    data[..., :2] = quantized.scales.astype("<f2")[..., None].view(np.uint8)
    data[..., 2:] = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return data.reshape(len(packed), -1)


def unpack(data: NDArray[np.uint8]) -> BlockQuantized:
    """Undoes :func:`pack`; nothing is rounded, so the error is 0."""
    blocks = data.reshape(len(data), -1, BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return BlockQuantized(codes[..., 0::2] | codes[..., 1::2] << 4, scales, 0.0)
