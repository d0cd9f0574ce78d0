"""Images near their own size and shape: both edges are multiples of what one visual token covers,
between a least and a greatest number of pixels (Qwen2-VL, section 2.1)."""

from __future__ import annotations

import math

import numpy as np

from mobilevlm.errors import ImageError
from mobilevlm.image import ImageInput, RoomFor, filter_of, read_resized
from mobilevlm.input_spec import DynamicImage, InputSpec
from mobilevlm.prompt import Piece, Prepared, Run

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
    if max(size) > LONGEST_SHAPE * min(size):
        raise ImageError(
            f"image of {width} × {height} pixels: this model takes images up to {LONGEST_SHAPE} "
            f"times as long as wide: cut it first"
        )
    return fitted(size, dynamic, (dynamic.min_pixels, dynamic.max_pixels))


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
