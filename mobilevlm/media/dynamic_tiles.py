"""Images near their own size, and larger ones as the grid of square tiles whose shape is nearest to
their own, with themselves near their own size behind it (LFM2-VL; ``resize_and_split`` of the
official code)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mobilevlm.image import ImageInput, RoomFor, filter_of, read_several
from mobilevlm.input_spec import DynamicTiles, InputSpec
from mobilevlm.media.aspect_tiles import nearest_grid
from mobilevlm.media.dynamic_image import LONGEST_SHAPE, resized, rounded
from mobilevlm.prompt import Piece, Prepared, Run


def prepare_dynamic_tiles(
    source: ImageInput, tiles: DynamicTiles, spec: InputSpec, room_for: RoomFor | None
) -> Prepared:
    """Return an image as one run of the encoder for each tile, row by row, the small whole last.

    Raises:
        ImageError: besides those of :func:`mobilevlm.image.read_several`, it is too long.
    """
    given, size = (0, 0), tiles.size

    def targets(found: tuple[int, int]) -> list[tuple[int, int]]:
        nonlocal given
        given = found
        (rows, columns), whole = _layout(found, tiles)
        canvas = [(columns * size, rows * size)] if rows * columns > 1 else []
        return [*canvas, *whole]

    resample, edge = filter_of(tiles.whole.resample), size * tiles.max_tiles
    images = read_several(source, targets, resample, room_for, edge)
    (rows, columns), whole = _layout(given, tiles)
    parts = images[len(images) - len(whole) :]
    if rows * columns > 1:
        squares = [
            images[0].crop((left, top, left + size, top + size))
            for top in range(0, rows * size, size)
            for left in range(0, columns * size, size)
        ]
        parts = [*squares, *parts]
    arrays = tuple({"pixels": np.asarray(part, np.uint8)} for part in parts)
    return Prepared("image", arrays, dynamic_tile_pieces(given, tiles, spec))


def dynamic_tile_pieces(
    image_size: tuple[int, int], tiles: DynamicTiles, spec: InputSpec
) -> tuple[Piece, ...]:
    """Return the pieces of an image of this width and height."""
    (rows, columns), whole = _layout(image_size, tiles)
    layout, found, is_split = spec.layout, list[Piece](), rows * columns > 1
    if is_split:
        run = Run(_rows((tiles.size, tiles.size), tiles))
        for row in range(rows):
            for column in range(columns):
                marks = layout.tile_ids[row][column] if layout.tile_ids else ()
                found += [*marks, run]
    for size in whole:
        found += [*(layout.thumbnail_ids if is_split else ()), Run(_rows(size, tiles))]
    return (*layout.begin_ids, *found, *layout.end_ids)


def dynamic_tile_shapes(tiles: DynamicTiles) -> Iterator[tuple[int, int]]:
    """Yield widths and heights of images among which are those with the fewest and the most rows:
    wholes with as few and as many squares as there may be, and large images of every shape of
    grid and whole."""
    whole, area = tiles.whole, tiles.whole.factor**2
    least, most = max(1, -(-whole.min_pixels // area)), whole.max_pixels // area
    wholes = {(rows, -(-least // rows)) for rows in range(1, least + 1)}
    wholes |= {(rows, most // rows) for rows in range(1, most + 1)}
    grids = {(rows, tiles.max_tiles // rows) for rows in range(1, tiles.max_tiles + 1)}
    for shape in sorted(wholes | grids | {(1, LONGEST_SHAPE)}):
        if max(shape) > LONGEST_SHAPE * min(shape):
            continue
        for scale in (1, tiles.size):
            down, across = (edge * whole.factor * scale for edge in shape)
            yield from ((across, down), (down, across))


def _rows(size: tuple[int, int], tiles: DynamicTiles) -> int:
    """Return how many rows the connector makes of one run."""
    width, height = size
    return (width // tiles.whole.factor) * (height // tiles.whole.factor)


def _layout(
    size: tuple[int, int], tiles: DynamicTiles
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the rows and columns of the grid of tiles, 1 and 1 where the image is not split, and
    the width and height of the small whole, where there is one.

    Raises:
        ImageError: the image is too long.
    """
    whole = resized(size, tiles.whole)
    width, height = rounded(size, tiles.whole)
    grid = (1, 1)
    if width * height > tiles.split_pixels:
        grid = nearest_grid(size, (tiles.min_tiles, tiles.max_tiles), tiles.size)
    return grid, [whole] if tiles.thumbnail or grid == (1, 1) else []
