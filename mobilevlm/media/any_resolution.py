"""Large images as tiles of the grid that fits them best, behind the whole made small (LLaVA-NeXT,
``anyres``; LLaVA-OneVision).

The image is brought into the grid's canvas with its ratio kept and black around it. Visual tokens
that only the black made are left out again, by the image's own size (``unpad``).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm.image import ImageInput, RoomFor, read_pixels, read_several
from mobilevlm.input_spec import AnyResolution, FixedImage, InputSpec
from mobilevlm.prompt import Assembly, Piece, Prepared, Run

_SHRUNK_FROM = 1.1
"""Edge of a grid over that of the most tiles, from which on it is made smaller."""


def prepare_any_resolution(
    source: ImageInput,
    anyres: AnyResolution,
    spec: InputSpec,
    room_for: RoomFor | None,
    images: int,
) -> Prepared:
    """Return an image of a prompt with so many as one run of the encoder for each tile, the whole
    first."""
    size = anyres.size
    if is_square(anyres, images):
        square = FixedImage(size, size, "pad", anyres.mean, anyres.std)
        pixels = read_pixels(source, square, room_for)
        return _prepared(({"pixels": pixels},), Assembly(spec.connector.out_grid, (0, 0)), spec)
    whole = given = (size, size)

    def targets(found: tuple[int, int]) -> list[tuple[int, int]]:
        nonlocal given
        given = found
        return [whole, _fitted(found, best_grid(found, anyres), size)]

    longest = size * max(map(max, _usable(anyres)))
    small, large = read_several(source, targets, Image.Resampling.BICUBIC, room_for, longest)
    rows, columns = best_grid(given, anyres)
    canvas = Image.new("RGB", (columns * size, rows * size))
    canvas.paste(large, ((canvas.width - large.width) // 2, (canvas.height - large.height) // 2))
    squares = [small]
    for row in range(rows):
        for column in range(columns):
            corner = (column * size, row * size)
            squares.append(canvas.crop((*corner, corner[0] + size, corner[1] + size)))
    arrays = tuple({"pixels": np.asarray(square, np.uint8)} for square in squares)
    return _prepared(arrays, image_assembly(given, anyres, spec.connector.out_grid), spec)


def any_resolution_pieces(
    size: tuple[int, int], anyres: AnyResolution, spec: InputSpec
) -> tuple[Piece, ...]:
    """Return the pieces of an image of this width and height, alone in its prompt."""
    if is_square(anyres, 1):
        return _pieces(Assembly(spec.connector.out_grid, (0, 0)).rows, spec)
    return _pieces(image_assembly(size, anyres, spec.connector.out_grid).rows, spec)


def least_pieces(spec: InputSpec) -> tuple[Piece, ...]:
    """Return pieces of which no image has fewer: of a needle nothing but the whole may remain."""
    return _pieces(spec.connector.num_tokens, spec)


def greatest_pieces(anyres: AnyResolution, spec: InputSpec) -> tuple[Piece, ...]:
    """Return pieces of which no image has more, and some have nearly as many: a grid that is made
    smaller keeps fewer tokens than one that just is not, and no more rows than it had."""
    side = spec.connector.out_grid
    if is_square(anyres, 1):
        return _pieces(Assembly(side, (0, 0)).rows, spec)
    most = math.inf
    if anyres.most_tiles:
        most = math.floor(_SHRUNK_FROM**2 * anyres.most_tiles * side**2)
    tokens = max(
        min(rows * columns * side**2, most) + rows * side for rows, columns in _usable(anyres)
    )
    return _pieces(side**2 + int(tokens), spec)


def most_tiles(anyres: AnyResolution) -> int:
    """Return the tiles of the largest grid; 0 where each image is one square."""
    return max((rows * columns for rows, columns in _usable(anyres)), default=0)


def best_grid(size: tuple[int, int], anyres: AnyResolution) -> tuple[int, int]:
    """Return the rows and columns of the grid that keeps most of an image of this width and height;
    of several the one that wastes least (``select_best_resolution`` of the official code)."""

    def quality(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = (count * anyres.size for count in grid)
        scale = min(width / size[0], height / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - width * height

    return max(_usable(anyres), key=quality)


def image_assembly(size: tuple[int, int], anyres: AnyResolution, side: int) -> Assembly:
    """Return how the visual tokens of an image of this width and height are put together;
    ``side``: those along an edge of a tile (``unpad_image`` of the official code)."""
    grid = best_grid(size, anyres)
    width, height = size
    rows, columns = (count * side for count in grid)
    if width / height > columns / rows:
        margins = ((rows - _covered(height, width, columns, anyres)) // 2, 0)
    else:
        margins = (0, (columns - _covered(width, height, rows, anyres)) // 2)
    kept = (rows - 2 * margins[0], columns - 2 * margins[1])
    return Assembly(side, grid, margins, _shrunk(kept, side, anyres))


def _covered(short: int, long: int, whole: int, anyres: AnyResolution) -> int:
    """Return how many rows or columns an image covers whose longer edge covers ``whole``."""
    covered = short * (whole / long)
    return int(round(covered, 7) if anyres.rounding else covered)


def _shrunk(size: tuple[int, int], side: int, anyres: AnyResolution) -> tuple[int, int]:
    """Return the rows and columns that a grid of this size is brought to."""
    rows, columns = size
    if anyres.most_tiles:
        ratio = math.sqrt(rows * columns / (anyres.most_tiles * side**2))
        if ratio > _SHRUNK_FROM:
            return int(rows // ratio), int(columns // ratio)
    return size


def _fitted(size: tuple[int, int], grid: tuple[int, int], edge: int) -> tuple[int, int]:
    """Return the width and height of an image inside a grid's canvas, its ratio kept."""
    (width, height), (rows, columns) = size, grid
    across, down = columns * edge / width, rows * edge / height
    if across < down:
        return columns * edge, min(math.ceil(height * across), rows * edge)
    return min(math.ceil(width * down), columns * edge), rows * edge


def is_assembly_of(anyres: AnyResolution, assembly: Assembly, spec: InputSpec) -> bool:
    """Return whether an image of this model may be put together so."""
    is_grid = assembly.tiles in (*anyres.grids, (0, 0))
    return is_grid and assembly.side == spec.connector.out_grid


def is_square(anyres: AnyResolution, images: int) -> bool:
    """Return whether an image of a prompt with so many becomes one tile."""
    return not _usable(anyres) or (anyres.several == "square" and images > 1)


def _usable(anyres: AnyResolution) -> tuple[tuple[int, int], ...]:
    """Return the grids of no more than ``max_tiles``."""
    if not anyres.max_tiles:
        return anyres.grids
    if anyres.max_tiles == 1:
        return ()
    return tuple(grid for grid in anyres.grids if grid[0] * grid[1] <= anyres.max_tiles)


def _prepared(
    arrays: tuple[dict[str, NDArray[np.uint8]], ...], assembly: Assembly, spec: InputSpec
) -> Prepared:
    return Prepared("image", arrays, _pieces(assembly.rows, spec), assembly)


def _pieces(rows: int, spec: InputSpec) -> tuple[Piece, ...]:
    return (*spec.layout.begin_ids, Run(rows), *spec.layout.end_ids)
