"""Bilinear resizing with antialiasing as torch does it for uint8 (``interpolate``; torchvision's
image processors).

Pillow's filter with weights of 16 bits in place of 22: some levels differ by one. Each direction
is a sum of integers, rounded to uint8. Products of floats give it exactly, since every partial sum
is an integer that they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_MOST_BITS = 22
"""Bits behind the point that a weight may have."""
_BLOCK = 16
"""Lines that are computed by one product."""
_ALONE = 1 << 18
"""Multiplications of one product: small enough that no other thread is asked to help, which would
be waited for on a busy machine."""


@dataclass(frozen=True)
class _Filter:
    """Sources of the lines of a result in one direction."""

    starts: NDArray[np.int64]
    """First line that each reads."""
    weights: NDArray[np.float64]
    """Integers ``(lines, read)`` of the lines from there on."""
    bits: int
    """Bits of the weights behind the point."""


def resize_bilinear(
    strips: Iterable[tuple[int, Image.Image]], before: tuple[int, int], after: tuple[int, int]
) -> Image.Image:
    """Return an image at another width and height. ``strips``: its first rows and parts."""
    across, down = (_filter(*edges) for edges in zip(before, after, strict=True))
    narrow = np.empty((before[1], after[0], 3), np.uint8)
    for top, strip in strips:
        columns = np.asarray(strip).transpose(1, 0, 2)
        made = _resample(columns.reshape(before[0], -1), across)
        narrow[top : top + strip.height] = made.reshape(after[0], -1, 3).transpose(1, 0, 2)
    rows = _resample(narrow.reshape(before[1], -1), down)
    return Image.fromarray(rows.reshape(after[1], after[0], 3))


def _resample(lines: NDArray[np.uint8], by: _Filter) -> NDArray[np.uint8]:
    """``(lines before, values)`` to ``(lines after, values)``."""
    half = 0.5 * 2**by.bits
    largest = 255 * by.weights.sum(axis=1).max() + half
    kind: type[Any] = np.float32 if largest < 1 << 24 else np.float64
    made = np.empty((len(by.starts), lines.shape[1]), np.uint8)
    blocks = list(_blocks(by, len(lines), kind))
    step = max(_ALONE // max(matrix.size for _, _, matrix in blocks), _BLOCK)
    for left in range(0, lines.shape[1], step):
        values = lines[:, left : left + step].astype(kind)
        for first, low, matrix in blocks:
            sums = matrix @ values[low : low + matrix.shape[1]]
            sums += kind(half)
            sums *= kind(0.5**by.bits)
            np.minimum(sums, 255, out=sums)
            made[first : first + len(sums), left : left + step] = sums  # rounded down
    return made


def _blocks(by: _Filter, count: int, kind: type[Any]) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Yield neighbouring lines of the result: the first, the first of ``count`` that they read, and
    their weights ``(lines, read)``."""
    for first in range(0, len(by.starts), _BLOCK):
        starts = by.starts[first : first + _BLOCK]
        low, high = int(starts[0]), min(int(starts[-1]) + by.weights.shape[1], count)
        matrix = np.zeros((len(starts), high - low), kind)
        for row, start in enumerate(starts - low):
            read = by.weights[first + row, : high - low - start]
            matrix[row, start : start + len(read)] = read
        yield first, low, matrix


def _filter(before: int, after: int) -> _Filter:
    """Return a triangle as wide as two lines of the longer side, cut at the image's edges, as
    integers of which the largest fits into 16 bits."""
    scale = before / after
    support = max(scale, 1.0)
    centers = scale * (np.arange(after) + 0.5)
    starts = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centers + support + 0.5).astype(np.int64), before)
    places = starts[:, None] + np.arange((ends - starts).max())
    inside = places < ends[:, None]
    shares = np.maximum(1 - np.abs((places - centers[:, None] + 0.5) / support), 0) * inside
    shares /= shares.sum(axis=1, keepdims=True)
    largest = float(shares.max())
    bits = next((b for b in range(_MOST_BITS) if 0.5 + largest * 2 ** (b + 1) >= 1 << 15), 22)
    return _Filter(starts, np.floor(0.5 + shares * 2**bits), bits)
