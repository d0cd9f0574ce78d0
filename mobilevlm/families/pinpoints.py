"""Sizes that images may be tiled to (``image_grid_pinpoints``), as grids of tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilevlm.errors import CheckpointError
from mobilevlm.input_spec import MOST_GRIDS, MOST_TILES

KEY = "image_grid_pinpoints"


def grids_of(path: Path, value: Any, size: int) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of tiles of ``size`` pixels for each height and width of a list.

    Raises:
        CheckpointError: it is no such list, tiles do not divide a size, or it takes too many.
    """
    if not isinstance(value, list) or not 0 < len(value) <= MOST_GRIDS:
        raise CheckpointError(
            f"{path}: {KEY!r} is {value!r:.60}, expected a list of 1 to {MOST_GRIDS} sizes"
        )
    return tuple(_grid(path, entry, size) for entry in value)


def _grid(path: Path, entry: Any, size: int) -> tuple[int, int]:
    if (
        not isinstance(entry, list | tuple)
        or len(entry) != 2
        or not all(type(edge) is int and edge > 0 for edge in entry)
    ):
        raise CheckpointError(f"{path}: {KEY!r} has {entry!r:.60}, expected two numbers of pixels")
    if any(edge % size for edge in entry):
        raise CheckpointError(
            f"{path}: {KEY!r} has {list(entry)!r:.60}, expected multiples of a tile's {size} pixels"
        )
    rows, columns = (edge // size for edge in entry)
    if rows * columns > MOST_TILES:
        raise CheckpointError(
            f"{path}: {KEY!r} has {list(entry)!r:.60}, which are {rows * columns} tiles: expected "
            f"at most {MOST_TILES}"
        )
    return rows, columns
