"""Large images as a grid of square tiles, the whole made small beside them (Idefics3, SmolVLM).

Up to three resizes, as in the official processors: the longest edge becomes ``longest_edge``, both
edges become multiples of a tile, and the small whole is made from the result of the second. Where
that would be more than ``max_tiles``, the longest edge becomes fewer whole tiles; an image that is
not split at all goes from ``longest_edge`` straight to the square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm.image import ImageInput, RoomFor, read_resized
from mobilevlm.input_spec import InputSpec, LayoutSpec, Tiles
from mobilevlm.prompt import Piece, Prepared, Run

_PARTS = 1 << 10
"""Pixels of a tile's edge, in the shapes of images."""


def prepare_tiles(
    source: ImageInput, tiles: Tiles, spec: InputSpec, room_for: RoomFor | None
) -> Prepared:
    """Return an image as one run of the encoder for each tile, in the order of their runs."""
    size, resample = tiles.size, Image.Resampling[tiles.resample.upper()]

    def longest(given: tuple[int, int]) -> tuple[int, int]:
        return _first_size(given, tiles)

    image = read_resized(source, longest, resample, room_for, tiles.longest_edge)
    rows, columns = _grid(image.size, tiles)
    image = image.resize((columns * size, rows * size), resample)
    squares = [
        _pixels(image.crop((column * size, row * size, (column + 1) * size, (row + 1) * size)))
        for row in range(rows)
        for column in range(columns)
    ]
    if tiles.thumbnail != "none" and len(squares) > 1:
        place = 0 if tiles.thumbnail == "first" else len(squares)
        squares.insert(place, _pixels(image.resize((size, size), resample)))
    arrays = tuple({"pixels": square} for square in squares)
    return Prepared("image", arrays, _pieces((rows, columns), tiles, spec))


def marked_layout(
    ids: Callable[[str], tuple[int, ...]], tiles: Tiles, around: str, whole: str, row_id: int
) -> LayoutSpec:
    """Return the ids around tiles, which line breaks and marks of their rows and columns stand
    between. ``ids``: of a text, by the tokenizer (line breaks that stand side by side may be one
    token); ``around``: before each tile and behind the last; ``whole``: of the image made small."""
    places = range(1, tiles.most_per_edge + 1)
    return LayoutSpec(
        end_ids=ids(around),
        row_id=row_id,
        tile_ids=tuple(
            tuple(ids(f"{around}<row_{row}_col_{column}>") for column in places) for row in places
        ),
        row_end_ids=ids("\n"),
        between_ids=ids("\n\n"),
        thumbnail_ids=ids(around + whole),
    )


def _pixels(square: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(square, np.uint8)


def tile_pieces(image_size: tuple[int, int], tiles: Tiles, spec: InputSpec) -> tuple[Piece, ...]:
    """Return the pieces of an image of this width and height."""
    return _pieces(_grid(_first_size(image_size, tiles), tiles), tiles, spec)


def tile_shapes(tiles: Tiles) -> Iterator[tuple[int, int]]:
    """Yield widths and heights of images that together become every grid of tiles there is: as
    wide as whole tiles, and a little less."""
    most = tiles.most_per_edge
    for long in range(1, most + 1):
        for short in range(1, long + 1):
            for less in (0, 1):
                edges = long * _PARTS, short * _PARTS - less
                yield from (edges, edges[::-1])


def _first_size(size: tuple[int, int], tiles: Tiles) -> tuple[int, int]:
    """Return the width and height of the first resize: the largest that gives no more tiles than
    there may be; ``longest_edge`` where none does."""
    whole = range(tiles.most_per_edge - 1, 1, -1)
    for edge in (tiles.longest_edge, *(count * tiles.size for count in whole)):
        found = _scaled(size, edge)
        if _may_be(_split(found, tiles.size), tiles):
            return found
    return _scaled(size, tiles.longest_edge)


def _grid(size: tuple[int, int], tiles: Tiles) -> tuple[int, int]:
    """Return how many rows and columns of tiles an image becomes after its first resize."""
    grid = _split(size, tiles.size)
    return grid if _may_be(grid, tiles) else (1, 1)


def _may_be(grid: tuple[int, int], tiles: Tiles) -> bool:
    return not tiles.max_tiles or grid[0] * grid[1] <= tiles.max_tiles


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return a size whose longer edge is ``longest``, and whose shorter one is even."""
    width, height = size
    ratio = width / height
    short = int(longest / ratio) if width >= height else int(longest * ratio)
    short = max(short + short % 2, 1)
    return (longest, short) if width >= height else (short, longest)


def _split(size: tuple[int, int], tile: int) -> tuple[int, int]:
    """Return how many rows and columns of tiles cover an image of this width and height."""
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
