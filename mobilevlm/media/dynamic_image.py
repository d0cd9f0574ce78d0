"""Images near their own size and shape: both edges are multiples of what one visual token covers,
between a least and a greatest number of pixels (Qwen2-VL, section 2.1)."""

from __future__ import annotations

import math

import numpy as np

from mobilevlm.errors import ImageError
from mobilevlm.image import ImageInput, RoomFor, filter_of, read_resized
from mobilevlm.input_spec import DynamicImage, InputSpec
from mobilevlm.prompt import Piece, Prepared, Run

_FINE = 1000
"""Edges of shapes in parts of a visual token"""
LONGEST_SHAPE = 200
"""Longer edge over the shorter one, at most, as in the official code."""


def prepare_dynamic(
    source: ImageInput, dynamic: DynamicImage, spec: InputSpec, room_for: RoomFor | None
) -> Prepared:
    """Return an image as pixels ``(height, width, 3)``.

    Raises:
        ImageError: besides those of :func:`mobilevlm.image.read_resized`, it is too long.
    """

    def target(size: tuple[int, int]) -> tuple[int, int]:
        return resized(size, dynamic)

    resample = filter_of(dynamic.resample)
    image = read_resized(source, target, resample, room_for, int(dynamic.max_pixels**0.5))
    arrays = {"pixels": np.asarray(image, np.uint8)}
    return Prepared("image", (arrays,), _pieces(image.size, dynamic, spec))


def dynamic_pieces(
    size: tuple[int, int], dynamic: DynamicImage, spec: InputSpec
) -> tuple[Piece, ...]:
    """Return the pieces of an image of this width and height."""
    return _pieces(resized(size, dynamic), dynamic, spec)


def _pieces(size: tuple[int, int], dynamic: DynamicImage, spec: InputSpec) -> tuple[Piece, ...]:
    columns, rows = (edge // dynamic.factor for edge in size)
    run = Run(rows * columns, (1, rows, columns))
    return (*spec.layout.begin_ids, run, *spec.layout.end_ids)


def most_dynamic_pixels(dynamic: DynamicImage) -> int:
    """Return the most pixels of an image or a frame: of long ones, which are never narrower than
    ``factor``, more than ``max_pixels``."""
    if dynamic.fill_edge:
        return dynamic.max_pixels
    most = max(dynamic.max_pixels, dynamic.clip.max_pixels if dynamic.clip else 0)
    return max(most, math.isqrt(most * LONGEST_SHAPE) * dynamic.factor)


def rounded(size: tuple[int, int], dynamic: DynamicImage) -> tuple[int, int]:
    """Return the nearest width and height that are multiples of ``factor``."""
    least = dynamic.factor if dynamic.least_edge else 0
    width, height = (max(least, round(edge / dynamic.factor) * dynamic.factor) for edge in size)
    return width, height


def resized(size: tuple[int, int], dynamic: DynamicImage) -> tuple[int, int]:
    """Return the width and height that an image is resized to (``smart_resize`` of the official
    code).

    Raises:
        ImageError: it is too long.
    """
    width, height = size
    if dynamic.fill_edge:
        return _filling(size, dynamic)
    if max(size) > LONGEST_SHAPE * min(size):
        raise ImageError(
            f"image of {width} × {height} pixels: this model takes images up to {LONGEST_SHAPE} "
            f"times as long as wide: cut it first"
        )
    return fitted(size, dynamic, (dynamic.min_pixels, dynamic.max_pixels))


def _filling(size: tuple[int, int], dynamic: DynamicImage) -> tuple[int, int]:
    """Return the width and height in multiples of ``factor`` that fill ``max_pixels`` in the shape
    of an image (``get_aspect_ratio_preserving_size`` of Gemma 4's official code). An image that
    would be narrower than ``factor`` keeps whole multiples of its shape.

    Raises:
        ImageError: it is too long.
    """
    factor, most = dynamic.factor, dynamic.max_pixels // dynamic.factor**2
    scale = math.sqrt(dynamic.max_pixels / math.prod(size))
    counts = [math.floor(scale * edge / factor) for edge in size]
    if 0 in counts:
        longest = min(max(size) // min(size), most)
        counts = [longest if count else 1 for count in counts]
    if max(counts) * factor > dynamic.fill_edge:
        raise ImageError(
            f"image of {size[0]} × {size[1]} pixels: this model takes images whose longer edge "
            f"becomes up to {dynamic.fill_edge} pixels, of this one {max(counts) * factor}: cut it "
            f"first"
        )
    return counts[0] * factor, counts[1] * factor


def filling_shapes(dynamic: DynamicImage) -> list[tuple[int, int]]:
    """Return shapes of images among which are those that take the fewest and the most visual
    tokens: just narrower than so many tokens, and as long as that leaves room for."""
    most = dynamic.max_pixels // dynamic.factor**2
    edges = range(1, math.isqrt(most) + 1)
    narrow = [(most * _FINE**2 + 1, (edge * _FINE) ** 2) for edge in edges]
    fitting = [(most // edge, edge) for edge in edges]
    longest = dynamic.fill_edge // dynamic.factor
    return [(a, b) for a, b in (*narrow, *fitting) if math.sqrt(most * a / b) < longest]


def fitted(
    size: tuple[int, int],
    dynamic: DynamicImage,
    limits: tuple[int, int],
    frames: int = 1,
    counted: int = 1,
) -> tuple[int, int]:
    """Return the multiples of ``factor`` near a width and height whose pixels are inside the
    limits, counted over so many frames; ``counted``: of the first try."""
    factor, (width, height), (least, most) = dynamic.factor, size, limits
    across, down = rounded(size, dynamic)
    if counted * across * down > most:
        scale = math.sqrt(frames * width * height / most)
        across, down = (max(factor, math.floor(edge / scale / factor) * factor) for edge in size)
    elif counted * across * down < least:
        scale = math.sqrt(least / (frames * width * height))
        across, down = (math.ceil(edge * scale / factor) * factor for edge in size)
    return across, down
