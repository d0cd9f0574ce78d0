"""Rows of an image from those of the encoder's runs, as the decoder reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mobilevlm.prompt import Assembly, Rows


def assemble(parts: Sequence[Rows], assembly: Assembly | None = None) -> Rows:
    """Return the rows of an image, from those of each run of its encoder: one behind the other
    without an ``assembly``. With one each run has the newline behind its visual tokens.
    """
    if assembly is None:
        if len(parts) == 1:
            return parts[0]
        deep = zip(*(part.deep for part in parts), strict=True)
        return Rows(
            np.concatenate([part.embeds for part in parts]),
            tuple(np.concatenate(rows) for rows in deep),
        )
    assert len(parts) == assembly.runs and not any(part.deep for part in parts)
    whole, newline = np.split(parts[0].embeds, [assembly.side**2])
    if assembly.runs == 1:
        return Rows(np.concatenate([whole, newline]))
    grid = _cut([part.embeds[:-1] for part in parts[1:]], assembly)
    height, width = assembly.size
    lines = np.empty((height, width + 1, whole.shape[1]), np.float32)
    lines[:, :width] = resize_bilinear(grid, height, width)
    lines[:, width] = newline
    return Rows(np.concatenate([whole, lines.reshape(-1, whole.shape[1])]))


def _cut(tiles: Sequence[NDArray[np.float32]], assembly: Assembly) -> NDArray[np.float32]:
    """Return the grid ``(rows, columns, hidden_size)`` that tiles form, without its margins."""
    (down, across), side = assembly.tiles, assembly.side
    grid = np.stack(tiles).reshape(down, across, side, side, -1)
    grid = grid.transpose(0, 2, 1, 3, 4).reshape(down * side, across * side, -1)
    above, left = assembly.margins
    return grid[above : len(grid) - above, left : grid.shape[1] - left]


def resize_bilinear(grid: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resize ``(rows, columns, channels)`` as ``torch.nn.functional.interpolate`` does with mode
    ``bilinear``: pixel centres, the border repeated, no antialiasing."""
    for axis, size in enumerate((height, width)):
        if grid.shape[axis] == size:
            continue
        low, share = _neighbours(grid.shape[axis], size)
        high = np.minimum(low + 1, grid.shape[axis] - 1)
        weight = share[:, None, None] if axis == 0 else share[None, :, None]
        grid = grid.take(low, axis) * (1 - weight) + grid.take(high, axis) * weight
    return grid


def _neighbours(before: int, after: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the lower neighbour of each of ``after`` positions among ``before``, and the share of
    the upper one."""
    scale = np.float32(before) / np.float32(after)
    places = np.maximum(scale * (np.arange(after, dtype=np.float32) + 0.5) - 0.5, 0)
    low = places.astype(np.intp)
    return low, (places - low).astype(np.float32)
