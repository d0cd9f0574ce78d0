"""Image to the uint8 pixels that the vision stage takes.

The same steps as the reference code's image processors, with Pillow: pad to a square with the mean
colour (or not), resize the shortest edge with bicubic filtering, crop the centre; or resize
straight to the square (SigLIP's and BLIP's); or resize the longer edge, then pad (Janus's). The
last step, ``(pixel / 255 - mean) / std``, is folded into the first layer of the exported graph.

Memory holds the decoded image once, as its file stores it. Turning it upright, colours, alpha and
the first pass of resizing happen strip by strip, with the bits that the whole would have: Pillow
resizes one direction, then the other, and a line does not depend on the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, ImageWarning
from mobilevlm.input_spec import FixedImage, FreeResampling, PixelImages
from mobilevlm.media.image_file import Room, RoomFor, check_size, read_image
from mobilevlm.media.image_source import ImageInput, open_source

__all__ = [
    "ImageInput",
    "Room",
    "RoomFor",
    "filter_of",
    "normalize",
    "open_image",
    "preprocess",
    "read_pixels",
    "read_resized",
    "read_several",
]

MAX_PADDED_EDGE = 32_768
"""Longer images are not padded to a square."""
MAX_PADDED_PIXELS = 1 << 28
"""Pixels of a square's rows that a tall image takes; more would take many seconds."""
_STRIP_PIXELS = 1 << 19
"""Pixels of a strip, about."""
COLUMNS_MAY_BE_FIRST = int(PIL.__version__.split(".")[0]) >= 13
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation."""
Box = tuple[int, int, int, int]
Filter: TypeAlias = Image.Resampling | Literal["torch_bilinear"]


@dataclass(frozen=True)
class _Stored:
    """An image as its file stores it, and what makes RGB of a part of it."""

    image: Image.Image
    turn: Image.Transpose | None = None
    full: float = 0.0
    """Value that is white, of images of wide numbers."""
    unsigned: bool = False
    """True if its 32-bit integers have no sign."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright."""
        width, height = self.image.size
        swapped = self.turn is not None and self.turn in (
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        )
        return (height, width) if swapped else (width, height)

    @property
    def is_plain(self) -> bool:
        """True if it is upright RGB already."""
        return (
            self.turn is None and self.image.mode == "RGB" and not self.image.has_transparency_data
        )

    def part(self, box: Box) -> Image.Image:
        """Return a part of the upright image as RGB, alpha over white."""
        if self.is_plain:
            return self.image.crop(box)
        part = self.image.crop(_stored_box(box, self.image.size, self.turn))
        if self.turn is not None:
            part = part.transpose(self.turn)
        if self.full:
            values = _numbers(part, self.unsigned).astype(np.float64)
            values *= 255.0 / self.full
            part = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        if part.has_transparency_data:
            layer = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", layer.size, (255,) * 4), layer)
        return part.convert("RGB")

    def strips(self, wide: int = 0) -> Iterator[tuple[int, Image.Image]]:
        """Yield the first row and the content of each strip. ``wide``: pixels of a row, where it
        is made longer than the image's."""
        width, height = self.size
        rows = max(_STRIP_PIXELS // max(width, wide), 1)
        for top in range(0, height, rows):
            yield top, self.part((0, top, width, min(top + rows, height)))

    def columns(self) -> Iterator[tuple[int, Image.Image]]:
        """Yield the first column and the content of each upright strip."""
        width, height = self.size
        count = max(_STRIP_PIXELS // height, 1)
        for left in range(0, width, count):
            yield left, self.part((left, 0, min(left + count, width), height))


def _stored_box(box: Box, size: tuple[int, int], turn: Image.Transpose | None) -> Box:
    """Return where a part of the upright image lies in the stored one, which has this size."""
    left, top, right, bottom = box
    width, height = size
    if turn is None:
        return box
    return {
        Image.Transpose.FLIP_LEFT_RIGHT: (width - right, top, width - left, bottom),
        Image.Transpose.ROTATE_180: (width - right, height - bottom, width - left, height - top),
        Image.Transpose.FLIP_TOP_BOTTOM: (left, height - bottom, right, height - top),
        Image.Transpose.TRANSPOSE: (top, left, bottom, right),
        Image.Transpose.ROTATE_270: (top, height - right, bottom, height - left),
        Image.Transpose.TRANSVERSE: (width - bottom, height - right, width - top, height - left),
        Image.Transpose.ROTATE_90: (width - bottom, left, width - top, right),
    }[turn]


def open_image(source: ImageInput, room_for: RoomFor | None = None) -> Image.Image:
    """Open an image as RGB, turned upright by its EXIF orientation, alpha over white.

    ``room_for``: memory that decoding may take; an image that needs more is refused.

    Raises:
        ImageError: it is missing, damaged, not an image, or too large.
    """
    stored = _read(source, room_for, None)
    if stored.is_plain:
        return stored.image.copy() if stored.image is source else stored.image
    image = Image.new("RGB", stored.size)
    for top, strip in stored.strips():
        image.paste(strip, (0, top))
    return image


def read_pixels(
    source: ImageInput, spec: FixedImage, room_for: RoomFor | None = None
) -> NDArray[np.uint8]:
    """Return uint8 pixels ``(size, size, 3)`` of an image in any form: the same as
    ``preprocess(open_image(source), spec)`` in less memory.

    ``room_for``: memory that this may take. Where a JPEG needs more it is decoded at a fraction of
    its size, and a warning says so; others are refused.

    Raises:
        ImageError: as of :func:`open_image` and :func:`preprocess`.
    """
    edge = spec.size if spec.aspect == "fit" else spec.shortest_edge
    return _pixels(_read(source, room_for, edge), spec)


def read_resized(
    source: ImageInput,
    target: Callable[[tuple[int, int]], tuple[int, int]],
    resample: Filter,
    room_for: RoomFor | None = None,
    edge: int | None = None,
) -> Image.Image:
    """Return an RGB image in any form at the width and height that ``target`` gives for its own.

    ``edge``: the shortest edge that a JPEG is decoded to, where memory demands it.

    Raises:
        ImageError: as of :func:`open_image`.
    """
    (image,) = read_several(source, lambda size: [target(size)], resample, room_for, edge)
    return image


def read_several(
    source: ImageInput,
    targets: Callable[[tuple[int, int]], list[tuple[int, int]]],
    resample: Filter,
    room_for: RoomFor | None = None,
    edge: int | None = None,
) -> list[Image.Image]:
    """Return one image at several sizes, each made from the original as by
    :func:`read_resized`."""
    stored = _read(source, room_for, edge)
    return [_resize(stored, size, resample) for size in targets(stored.size)]


def preprocess(image: Image.Image, spec: FixedImage) -> NDArray[np.uint8]:
    """RGB image to uint8 pixels ``(size, size, 3)``, before mean and standard deviation.

    Raises:
        ImageError: the image is too long to be padded to a square.
    """
    return _pixels(_Stored(image), spec)


def filter_of(resample: FreeResampling) -> Filter:
    """Return the filter that a spec names."""
    return resample if resample == "torch_bilinear" else Image.Resampling[resample.upper()]


def normalize(pixels: NDArray[np.uint8], spec: PixelImages) -> NDArray[np.float32]:
    """uint8 ``(height, width, channels)`` to float32 ``(channels, height, width)``:
    ``(pixel / 255 - mean) / std``. Channels are those of one frame or of several."""
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    frames = pixels.shape[2] // 3
    mean, std = (np.tile(np.asarray(item, np.float32), frames) for item in (spec.mean, spec.std))
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def _read(source: ImageInput, room_for: RoomFor | None, edge: int | None) -> _Stored:
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ImageError(
                f"image array: expected uint8 of shape (height, width, 3), "
                f"found {source.dtype} {source.shape}"
            )
        return _Stored(Image.fromarray(source))
    if isinstance(source, Image.Image):
        name = shown(getattr(source, "filename", "")) or "Pillow image"
        check_size(source, name)
        return _described(source, name)
    with open_source(source) as (name, file):
        return _described(read_image(file, name, room_for, edge), name)


def _described(image: Image.Image, name: str) -> _Stored:
    """Say how an image becomes upright RGB.

    Raises:
        ImageError: it cannot, or its pixels cannot be decoded (of Pillow's lazy images).
    """
    try:
        image.load()
        turn = _TURNS.get(_orientation(image, name))
        wide = image.mode.startswith(("I", "F"))
        unsigned = wide and _is_unsigned(image)
        stored = _Stored(image, turn, _full_scale(image, unsigned, name) if wide else 0.0, unsigned)
        stored.part((0, 0, 1, 1))  # whether Pillow converts this mode
    except ImageError:
        raise
    except Exception as error:  # a decoder of others' on a file of others'
        told = shown(error) or type(error).__name__
        raise ImageError(f"{name}: damaged {image.format or ''} image ({told})") from None
    return stored


def _orientation(image: Image.Image, name: str) -> int:
    """Return the EXIF orientation; other tags are not looked at."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # a reader of others' on a file of others'
        told = shown(error, 80) or type(error).__name__
        warnings.warn(
            f"{name}: damaged EXIF ({told}): taken as upright", ImageWarning, stacklevel=2
        )
        return 1
    return orientation if isinstance(orientation, int) else 1


def _is_unsigned(image: Image.Image) -> bool:
    """Return whether a TIFF file's 32-bit integers have no sign; Pillow reads them as if."""
    tags = getattr(image, "tag_v2", {})
    return image.mode == "I" and tags.get(258, (0,))[0] == 32 and tags.get(339, (1,))[0] == 1


def _numbers(image: Image.Image, unsigned: bool) -> NDArray[np.generic]:
    values = np.asarray(image)
    return values.view(np.uint32) if unsigned else values


def _full_scale(image: Image.Image, unsigned: bool, name: str) -> float:
    """Return the value that is white in an image of 16-bit, 32-bit or float numbers.

    A file does not say it but for 16 bits, so it is the least of 1 (floats), 255 and 65535 that no
    value exceeds, else the largest value.
    """
    if image.mode.startswith("I;16"):
        return 65535.0
    least, most = float("inf"), -float("inf")
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        values = _numbers(strip, unsigned)
        # Of not-a-number both are not-a-number, which no comparison below lets pass.
        least, most = float(np.minimum(least, values.min())), float(np.maximum(most, values.max()))
    if not (least >= 0 and most < float("inf")):
        raise ImageError(
            f"{name}: an image of numbers from {least:g} to {most:g}: scale them to 0 … 255 first"
        )
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((scale for scale in scales if most <= scale), most)


def _pixels(stored: _Stored, spec: FixedImage) -> NDArray[np.uint8]:
    resample = Image.Resampling[spec.resample.upper()]
    if spec.aspect == "resize":
        image = _resize(stored, (spec.size, spec.size), resample)
    elif spec.aspect == "pad":
        image = _pad_and_resize(stored, spec.pad_color, spec.shortest_edge, resample)
    elif spec.aspect == "fit":
        image = _resize_and_pad(stored, spec, resample)
    else:
        image = _resize_shortest_edge(stored, spec.shortest_edge, resample)
    return _center_crop(np.asarray(image, np.uint8), spec.size)


def _resize(stored: _Stored, size: tuple[int, int], resample: Filter) -> Image.Image:
    """Resize to a size strip by strip, in the order of Pillow's passes: the first pass of a strip
    does not depend on the others."""
    if resample == "torch_bilinear":
        from mobilevlm.media.torch_bilinear import resize_bilinear  # for who needs it

        return resize_bilinear(stored.strips(), stored.size, size)
    width, height = size
    if _columns_first(stored.size, size):
        short = Image.new("RGB", (stored.size[0], height))
        for left, strip in stored.columns():
            short.paste(strip.resize((strip.width, height), resample), (left, 0))
        return short.resize(size, resample)
    narrow = Image.new("RGB", (width, stored.size[1]))
    for top, strip in stored.strips(width):
        narrow.paste(strip.resize((width, strip.height), resample), (0, top))
    return narrow.resize((width, height), resample)


def _columns_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Return whether Pillow resizes columns before rows: from version 13 on, where that saves much
    (ImagingResampleInner of its Resample.c)."""
    saved = [old - new for old, new in zip(before, after, strict=True)]
    return COLUMNS_MAY_BE_FIRST and saved[1] > max(0, 2 * saved[0])


def _pad_and_resize(
    stored: _Stored, color: tuple[int, int, int], edge: int, resample: Image.Resampling
) -> Image.Image:
    """Pad to a square, the image at ``(long - short) // 2`` (``expand2square`` in the reference
    code), and resize it to ``edge``. The square is never in memory as a whole."""
    width, height = stored.size
    long = max(width, height)
    if long > MAX_PADDED_EDGE or height * long > MAX_PADDED_PIXELS:
        most = MAX_PADDED_EDGE if width > height else int(MAX_PADDED_PIXELS**0.5)
        raise ImageError(
            f"image of {width} × {height} pixels: this model pads images to a square, and those "
            f"longer than {most} are not padded: scale it down or cut it first"
        )
    left, above = (long - width) // 2, (long - height) // 2
    narrow = Image.new("RGB", (edge, long), color)
    for top, strip in stored.strips(long):
        if width < long:
            padded = Image.new("RGB", (long, strip.height), color)
            padded.paste(strip, (left, 0))
            strip = padded
        narrow.paste(strip.resize((edge, strip.height), resample), (0, above + top))
    return narrow.resize((edge, edge), resample)


def _resize_and_pad(stored: _Stored, spec: FixedImage, resample: Filter) -> Image.Image:
    """Resize so that the longer edge is that of the square, edges rounded half to even, and put the
    image in the middle of the mean colour (``JanusImageProcessor``)."""
    scale = spec.size / max(stored.size)
    width, height = (max(round(edge * scale), spec.shortest_edge) for edge in stored.size)
    square = Image.new("RGB", (spec.size, spec.size), spec.pad_color)
    place = ((spec.size - width) // 2, (spec.size - height) // 2)
    square.paste(_resize(stored, (width, height), resample), place)
    return square


def _resize_shortest_edge(stored: _Stored, edge: int, resample: Image.Resampling) -> Image.Image:
    width, height = stored.size
    short, long = min(width, height), max(width, height)
    long_edge = int(edge * long / short)
    size = (edge, long_edge) if width <= height else (long_edge, edge)
    if long_edge > 64 * edge:  # a needle: only its middle survives the crop, so resize only that
        keep = 4 * short + (long - 4 * short) % 2  # an even rest leaves the middle where it is
        start = (long - keep) // 2
        upright = (0, start, width, start + keep)
        box = upright if width <= height else (start, 0, start + keep, height)
        return _resize_shortest_edge(_Stored(stored.part(box)), edge, resample)
    return _resize(stored, size, resample)


def _center_crop(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Cuts the centre; an edge shorter than ``size`` is padded with black, as in the reference."""
    height, width, _ = pixels.shape
    if height < size or width < size:
        canvas = np.zeros((max(height, size), max(width, size), 3), np.uint8)
        top, left = -(-(canvas.shape[0] - height) // 2), -(-(canvas.shape[1] - width) // 2)
        canvas[top : top + height, left : left + width] = pixels
        pixels, (height, width, _) = canvas, canvas.shape
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])
