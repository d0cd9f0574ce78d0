"""Sizes that images may be tiled to (``image_grid_pinpoints``), as grids of tiles."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import config_value
from mobilevlm.input_spec import MOST_GRIDS, MOST_TILES, AnyResolution, FixedImage

KEY = "image_grid_pinpoints"
_LONGEST = 1 << 16
"""Characters of sizes in a text."""


def grids_of(path: Path, value: Any, size: int) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of tiles of ``size`` pixels for each height and width of a list.

    Raises:
        CheckpointError: it is no such list, a size is no multiple of a tile, or it has too many.
    """
    if not isinstance(value, list) or not 0 < len(value) <= MOST_GRIDS:
        raise CheckpointError(
            f"{path}: {KEY!r} is {value!r:.60}, expected a list of 1 to {MOST_GRIDS} sizes"
        )
    return tuple(_grid(path, entry, size) for entry in value)


def agreed_grids(
    settings: Mapping[Path, Mapping[str, Any]], size: int
) -> tuple[tuple[int, int], ...]:
    """Return the grids of a checkpoint whose files may each name them. ``settings``: of each file,
    the one that must first.

    Raises:
        CheckpointError: no file names them, one does wrongly, or two say different things.
    """
    given = {path: found[KEY] for path, found in settings.items() if found.get(KEY) is not None}
    read = {path: grids_of(path, value, size) for path, value in given.items()}
    if not read:
        raise CheckpointError(f"{next(iter(settings))}: key {KEY!r} is missing, expected sizes")
    (path, first), *others = read.items()
    for other, grids in others:
        if grids != first:
            raise CheckpointError(
                f"{path}: {KEY!r} is not that of {other.name}: give the files of one model"
            )
    return first


def any_resolution(path: Path, config: dict[str, Any], square: FixedImage) -> AnyResolution | None:
    """Return the tiles of a checkpoint in LLaVA's own layout (1.6), none of one without; there the
    width of a size comes first. ``square``: how one tile is prepared.

    Raises:
        CheckpointError: they are put together in a way that is not supported, or a size is wrong.
    """
    aspect = config.get("image_aspect_ratio")
    if not isinstance(aspect, str) or not aspect.startswith("anyres"):
        return None
    if aspect != "anyres":
        raise CheckpointError(
            f"{path}: 'image_aspect_ratio' is {aspect!r:.60}, expected 'anyres', 'pad' or 'square'"
        )
    merge = config_value(path, config, "mm_patch_merge_type", str, "flat")
    if merge != "spatial_unpad":
        raise CheckpointError(
            f"{path}: 'mm_patch_merge_type' is {merge!r:.60}, expected 'spatial_unpad' beside "
            f"'image_aspect_ratio' 'anyres'"
        )
    if square.shortest_edge != square.size:
        raise CheckpointError(
            f"{path}: the tower resizes images to {square.shortest_edge} pixels before it cuts out "
            f"{square.size}, expected the same of tiles"
        )
    grids = grids_of(path, _listed(config.get(KEY)), square.size)
    by_row = tuple((rows, columns) for columns, rows in grids)
    return AnyResolution(square.size, by_row, square.mean, square.std, rounding=False)


def _listed(value: Any) -> Any:
    """Return sizes that a configuration may have as the text of a Python list."""
    if isinstance(value, str):
        try:
            return ast.literal_eval(value[:_LONGEST])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    return value


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
