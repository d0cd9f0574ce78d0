"""Fewer visual tokens for the decoder, without training: means over a coarser grid, between encoder
and decoder.

Pooling is a baseline. Methods that choose or merge rows by their likeness did not beat it where
answers stay usable (docs/explanation/runtime.md, benchmarks/image_tokens.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import ImageError
from mobilevlm.prompt import Piece, Prepared, Reduction, Rows, Run, count_rows

Float32 = NDArray[np.float32]


def with_fewer_rows(image: Prepared, most: int) -> Prepared:
    """Return an image whose rows are made at most ``most``; one that has no more as it is.

    Raises:
        ImageError: its rows form no grid, or were made fewer already.
    """
    found = count_rows(image.pieces)
    if found <= most:
        return image
    behind = 0 if image.assembly is None else 1  # the newline
    grid = _grid_of(image, found - behind)
    runs = [piece for piece in image.pieces if isinstance(piece, Run)]
    if grid is None or len(runs) > 1 or image.reduction is not None or most <= behind:
        raise ImageError(f"an image of {found} visual tokens, which cannot be made {most}")
    reduction = Reduction(grid, pooled_size(grid, most - behind), behind)
    pieces = with_rows(image.pieces, math.prod(reduction.size) + behind)
    return replace(image, pieces=pieces, reduction=reduction)


def with_rows(pieces: Iterable[Piece], rows: int) -> tuple[Piece, ...]:
    """Return the pieces of an image in one run with so many rows."""
    return tuple(Run(rows) if isinstance(piece, Run) else piece for piece in pieces)


def reduced(rows: Rows, reduction: Reduction) -> Rows:
    """Return the rows of an image, made fewer."""
    count = math.prod(reduction.grid)
    assert len(rows) == count + reduction.behind and not rows.deep, "rows of another image"
    fewer = pooled(rows.embeds[:count], reduction.grid, reduction.size)
    return Rows(np.concatenate([fewer, rows.embeds[count:]]))


def pooled(rows: Float32, grid: tuple[int, int], size: tuple[int, int]) -> Float32:
    """Return means over the cells of a coarser grid; the cells overlap where a size is no multiple
    (adaptive average pooling)."""
    cells = rows.reshape(*grid, -1)
    for axis, (before, after) in enumerate(zip(grid, size, strict=True)):
        spans = [
            range(index * before // after, -(-(index + 1) * before // after))
            for index in range(after)
        ]
        cells = np.stack([cells.take(span, axis).mean(axis) for span in spans], axis)
    return cells.reshape(-1, rows.shape[1])


def pooled_size(grid: tuple[int, int], most: int) -> tuple[int, int]:
    """Return the rows and columns of the finest grid of at most ``most`` places that is coarsened
    about equally in both directions."""
    sizes = [(down, min(grid[1], most // down)) for down in range(1, min(grid[0], most) + 1)]
    scale = [min(down / grid[0], across / grid[1]) for down, across in sizes]
    return max(zip(scale, map(math.prod, sizes), sizes, strict=True))[2]


def _grid_of(image: Prepared, count: int) -> tuple[int, int] | None:
    """Return the rows and columns of the visual tokens of an image that is encoded in one run."""
    if len(image.arrays) != 1 or "pixels" not in image.arrays[0]:
        return None
    height, width = image.arrays[0]["pixels"].shape[:2]
    down = max(round(math.sqrt(count * height / width)), 1)
    return (down, count // down) if count % down == 0 else None
