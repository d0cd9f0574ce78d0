"""Images as the grid of square tiles whose shape is nearest to their own (InternVL 1.5, section
3.2; ``dynamic_preprocess`` of the official code): one resize straight to the grid, whatever the
shape, and one to the small whole that follows."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from mobilevlm.image import ImageInput, RoomFor, read_several
from mobilevlm.input_spec import AspectTiles, InputSpec
from mobilevlm.prompt import Piece, Prepared, Run


def prepare_aspect_tiles(
    source: ImageInput, tiles: AspectTiles, spec: InputSpec, room_for: RoomFor | None
) -> Prepared:
    """Return an image as one run of the encoder for each tile, row by row, the small whole last."""
    size, bicubic = tiles.size, Image.Resampling.BICUBIC

    def targets(given: tuple[int, int]) -> list[tuple[int, int]]:
        rows, columns = _grid(given, tiles)
        whole = [(size, size)] if tiles.thumbnail and rows * columns > 1 else []
        return [(columns * size, rows * size), *whole]

    edge = size * math.isqrt(tiles.max_tiles)
    canvas, *whole = read_several(source, targets, bicubic, room_for, edge)
    grid = canvas.height // size, canvas.width // size
    squares = [
        canvas.crop((left, top, left + size, top + size))
        for top in range(0, canvas.height, size)
        for left in range(0, canvas.width, size)
    ]
    arrays = tuple({"pixels": np.asarray(square, np.uint8)} for square in (*squares, *whole))
    return Prepared("image", arrays, _pieces(grid, tiles, spec))


def aspect_pieces(
    image_size: tuple[int, int], tiles: AspectTiles, spec: InputSpec
) -> tuple[Piece, ...]:
    """Return the pieces of an image of this width and height: one run for all its tiles."""
    return _pieces(_grid(image_size, tiles), tiles, spec)


def _pieces(grid: tuple[int, int], tiles: AspectTiles, spec: InputSpec) -> tuple[Piece, ...]:
    count = math.prod(grid)
    count += tiles.thumbnail and count > 1
    run = Run(count * spec.connector.num_tokens)
    return (*spec.layout.begin_ids, run, *spec.layout.end_ids)


def _grid(image_size: tuple[int, int], tiles: AspectTiles) -> tuple[int, int]:
    """Return the rows and columns of an image's grid."""
    return nearest_grid(image_size, (tiles.min_tiles, tiles.max_tiles), tiles.size)


def nearest_grid(
    image_size: tuple[int, int], counts: tuple[int, int], tile: int
) -> tuple[int, int]:
    """Return the rows and columns of the grid with the nearest ratio of edges. Of several with one
    ratio, a larger one is taken if the image has more than half its pixels. ``counts``: tiles at
    least and at most; ``tile``: edge of one."""
    width, height = image_size
    least, most = counts
    grids = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if rows * columns >= least
    ]
    best, nearest = (1, 1), math.inf
    for rows, columns in sorted(grids, key=math.prod):
        distance = abs(width / height - columns / rows)
        half = rows * columns * tile**2 / 2
        if distance < nearest or (distance == nearest and width * height > half):
            best, nearest = (rows, columns), distance
    return best
