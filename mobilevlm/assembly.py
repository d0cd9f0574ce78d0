"""Rows of an image from those of the encoder's runs, as the decoder reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mobilevlm.prompt import Assembly, Rows


def assemble(parts: Iterable[Rows], assembly: Assembly | None = None) -> Rows:
    """Return the rows of an image, from those of each run of its encoder: one behind the other
    without an ``assembly``. With one each run has the newline behind its visual tokens; runs are
    asked for one by one, and no two are held.
    """
    if assembly is None:
        return _joined(list(parts))
    runs = iter(parts)
    first = next(runs)
    assert not first.deep
    whole, newline = np.split(first.embeds, [assembly.side**2])
    if assembly.runs == 1:
        return first
    grid = _grid(runs, assembly, whole.shape[1])
    above, left = assembly.margins
    grid = grid[above : len(grid) - above, left : grid.shape[1] - left]
    height, width = assembly.size
    lines = np.empty((height, width + 1, whole.shape[1]), np.float32)
    lines[:, :width] = resize_bilinear(grid, height, width)
    lines[:, width] = newline
    return Rows(np.concatenate([whole, lines.reshape(-1, whole.shape[1])]))


def _joined(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    deep = zip(*(part.deep for part in parts), strict=True)
    return Rows(
        np.concatenate([part.embeds for part in parts]),
        tuple(np.concatenate(rows) for rows in deep),
    )


def _grid(runs: Iterator[Rows], assembly: Assembly, hidden_size: int) -> NDArray[np.float32]:
    """Return the grid ``(rows, columns, hidden_size)`` that tiles form."""
    (down, across), side = assembly.tiles, assembly.side
    grid = np.empty((down, side, across, side, hidden_size), np.float32)
    for index in range(down * across):
        row, column = divmod(index, across)
        grid[row, :, column] = next(runs).embeds[:-1].reshape(side, side, -1)
    return grid.reshape(down * side, across * side, -1)


def resize_bilinear(grid: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resize ``(rows, columns, channels)`` as ``torch.nn.functional.interpolate`` does with mode
    ``bilinear``: pixel centres, the border repeated, no antialiasing."""
    if len(grid) != height:
        low, share = _neighbours(len(grid), height)
        rows = np.empty((height, *grid.shape[1:]), np.float32)
        for index, (place, weight) in enumerate(zip(low, share, strict=True)):
            above, below = grid[place], grid[min(place + 1, len(grid) - 1)]
            rows[index] = above * (1 - weight) + below * weight
        grid = rows
    if grid.shape[1] != width:
        low, share = _neighbours(grid.shape[1], width)
        high = np.minimum(low + 1, grid.shape[1] - 1)
        weight = share[:, None]
        found = np.empty((len(grid), width, grid.shape[2]), np.float32)
        for index, row in enumerate(grid):
            found[index] = row[low] * (1 - weight) + row[high] * weight
        grid = found
    return grid


def _neighbours(before: int, after: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the lower neighbour of each of ``after`` positions among ``before``, and the share of
    the upper one."""
    scale = np.float32(before) / np.float32(after)
    places = np.maximum(scale * (np.arange(after, dtype=np.float32) + 0.5) - 0.5, 0)
    low = places.astype(np.intp)
    return low, (places - low).astype(np.float32)
