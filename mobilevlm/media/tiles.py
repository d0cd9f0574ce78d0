"""Large images as a grid of square tiles, the whole made small beside them (Idefics3, SmolVLM).

Up to three resizes, as in the official processors: the longest edge becomes ``longest_edge``, both
edges become multiples of a tile, and the small whole is made from the result of the second.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from mobilevlm.image import ImageInput, RoomFor, read_resized
from mobilevlm.input_spec import InputSpec, LayoutSpec, Tiles
from mobilevlm.prompt import Piece, Prepared, Run


def prepare_tiles(
    source: ImageInput, tiles: Tiles, spec: InputSpec, room_for: RoomFor | None
) -> Prepared:
    """Return an image as one run of the encoder for each tile, in the order of their runs."""
    size, resample = tiles.size, Image.Resampling[tiles.resample.upper()]

    def longest(given: tuple[int, int]) -> tuple[int, int]:
        return _scaled(given, tiles.longest_edge)

    image = read_resized(source, longest, resample, room_for, tiles.longest_edge)
    rows, columns = _grid(image.size, size)
    image = image.resize((columns * size, rows * size), resample)
    squares = [
        image.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        for row in range(rows)
        for column in range(columns)
    ]
    if tiles.thumbnail != "none" and len(squares) > 1:
        place = 0 if tiles.thumbnail == "first" else len(squares)
        squares.insert(place, image.resize((size, size), resample))
    arrays = tuple({"pixels": np.asarray(square, np.uint8)} for square in squares)
    return Prepared("image", arrays, _pieces((rows, columns), tiles, spec))


def tile_pieces(image_size: tuple[int, int], tiles: Tiles, spec: InputSpec) -> tuple[Piece, ...]:
    """Return the pieces of an image of this width and height."""
    return _pieces(_grid(_scaled(image_size, tiles.longest_edge), tiles.size), tiles, spec)


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return a size whose longer edge is ``longest``, and whose shorter one is even."""
    width, height = size
    ratio = width / height
    short = int(longest / ratio) if width >= height else int(longest * ratio)
    short = max(short + short % 2, 1)
    return (longest, short) if width >= height else (short, longest)


def _grid(size: tuple[int, int], tile: int) -> tuple[int, int]:
    """Return how many rows and columns of tiles an image of this width and height becomes."""
    width, height = size
    if max(size) <= tile:
        return 1, 1
    ratio = width / height
    if width >= height:
        columns = -(-width // tile)
        return max(1, -(-int(columns * tile / ratio) // tile)), columns
    rows = -(-height // tile)
    return rows, max(1, -(-int(rows * tile * ratio) // tile))


def _pieces(grid: tuple[int, int], tiles: Tiles, spec: InputSpec) -> tuple[Piece, ...]:
    rows, columns = grid
    layout, run = spec.layout, Run(spec.connector.num_tokens)
    whole: list[Piece] = [*layout.thumbnail_ids, run]
    if tiles.thumbnail != "none" and rows * columns == 1:
        return (*layout.begin_ids, *whole, *layout.end_ids)
    found: list[Piece] = []
    for row in range(rows):
        found += layout.row_end_ids if row else ()
        for column in range(columns):
            found += [*_tile_ids(layout, row, column), run]
    if tiles.thumbnail == "first":
        found = [*whole, *layout.between_ids, *found]
    elif tiles.thumbnail == "last":
        found += [*layout.between_ids, *whole]
    return (*layout.begin_ids, *found, *layout.end_ids)


def _tile_ids(layout: LayoutSpec, row: int, column: int) -> tuple[int, ...]:
    """Return the ids before a tile; none where the layout marks no tiles."""
    return layout.tile_ids[row][column] if layout.tile_ids else ()
