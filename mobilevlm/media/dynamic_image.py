"""Images near their own size and shape: both edges are multiples of what one visual token covers,
between a least and a greatest number of pixels (Qwen2-VL, section 2.1)."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from mobilevlm.errors import ImageError
from mobilevlm.image import ImageInput, RoomFor, read_resized
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

    resample = Image.Resampling[dynamic.resample.upper()]
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


def resized(size: tuple[int, int], dynamic: DynamicImage) -> tuple[int, int]:
    """Return the width and height that an image is resized to (``smart_resize`` of the official
    code).

    Raises:
        ImageError: it is too long.
    """
    factor, (width, height) = dynamic.factor, size
    if max(size) > LONGEST_SHAPE * min(size):
        raise ImageError(
            f"image of {width} × {height} pixels: this model takes images up to {LONGEST_SHAPE} "
            f"times as long as wide: cut it first"
        )
    across, down = (round(edge / factor) * factor for edge in size)
    if across * down > dynamic.max_pixels:
        scale = math.sqrt(width * height / dynamic.max_pixels)
        across, down = (max(factor, math.floor(edge / scale / factor) * factor) for edge in size)
    elif across * down < dynamic.min_pixels:
        scale = math.sqrt(dynamic.min_pixels / (width * height))
        across, down = (math.ceil(edge * scale / factor) * factor for edge in size)
    return across, down
