"""Picture file to the uint8 pixels that the vision stage takes.

The same steps as the reference code's image processors, with Pillow: pad to a square with the mean
colour (or not), resize the shortest edge with bicubic filtering, crop the centre; or resize
straight to the square (SigLIP's and BLIP's). The last step, ``(pixel / 255 - mean) / std``, is
folded into the first layer of the exported graph.
"""

from __future__ import annotations

import io
import warnings
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mobilevlm.errors import ImageError
from mobilevlm.spec import ImageSpec

ImageInput: TypeAlias = "str | PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
"""A path, the bytes of a picture file, a Pillow image, or uint8 pixels ``(height, width, 3)``."""

MAX_PIXELS = 178_956_970
"""Larger pictures are refused before they are decoded (Pillow's own decompression-bomb limit)."""
MAX_PADDED_EDGE = 32_768
"""Longer pictures are not padded to a square: that would take minutes."""
_STRIP = 64
"""Rows of the padded square that are in memory at once."""


def open_image(source: ImageInput) -> Image.Image:
    """Opens a picture as RGB, turned upright by its EXIF orientation, alpha over white.

    Raises:
        ImageError: the file is missing, damaged, not a picture, or too large.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ImageError(
                f"image array: expected uint8 of shape (height, width, 3), "
                f"found {source.dtype} {source.shape}"
            )
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        if not all(source.size):
            raise ImageError(f"image of {source.width} × {source.height} pixels: it is empty")
        return _upright_rgb(source)
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ImageError(f"{name}: no such picture file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about metadata that nobody asked for
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return _upright_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(
            f"{name}: more than {Image.MAX_IMAGE_PIXELS or MAX_PIXELS} pixels: scale it down first"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture in a format that Pillow reads") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{name}: damaged picture ({error})") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):  # 16-bit and float greys: scale to 8 bits
        values = np.asarray(upright, np.float64)
        deep = upright.mode.startswith("I;16") or values.max(initial=0.0) > 255
        full = 65535.0 if deep else 255.0
        upright = Image.fromarray((values * (255.0 / full)).clip(0, 255).astype(np.uint8))
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(white, layer)
    return upright.convert("RGB")


def preprocess(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """RGB picture to uint8 pixels ``(size, size, 3)``, before mean and standard deviation.

    Raises:
        ImageError: the picture is too long to be padded to a square.
    """
    if spec.aspect == "resize":
        image = image.resize((spec.size, spec.size), Image.Resampling.BICUBIC)
    elif spec.aspect == "pad":
        image = _pad_and_resize(image, spec.pad_color, spec.shortest_edge)
    else:
        image = _resize_shortest_edge(image, spec.shortest_edge)
    return _center_crop(np.asarray(image, np.uint8), spec.size)


def normalize(pixels: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """uint8 ``(size, size, 3)`` to float32 ``(3, size, size)``: ``(pixel / 255 - mean) / std``."""
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    values = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _pad_and_resize(image: Image.Image, color: tuple[int, int, int], edge: int) -> Image.Image:
    """Pads to a square, the picture at ``(long - short) // 2`` (``expand2square`` in the reference
    code), and resizes it to ``edge``.

    Pillow resizes rows first, then columns. Rows are done here strip by strip, so that the square,
    which is much larger than a long picture, is never in memory; the result is the same.
    """
    width, height = image.size
    long = max(width, height)
    if long > MAX_PADDED_EDGE:
        raise ImageError(
            f"picture of {width} × {height} pixels: longer than {MAX_PADDED_EDGE}: scale it down "
            f"or cut it first"
        )
    left, top = (long - width) // 2, (long - height) // 2
    narrow = Image.new("RGB", (edge, long), color)
    for start in range(0, height, _STRIP):
        rows = min(_STRIP, height - start)
        strip = Image.new("RGB", (long, rows), color)
        strip.paste(image.crop((0, start, width, start + rows)), (left, 0))
        narrow.paste(strip.resize((edge, rows), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((edge, edge), Image.Resampling.BICUBIC)


def _resize_shortest_edge(image: Image.Image, edge: int) -> Image.Image:
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long_edge = int(edge * long / short)
    size = (edge, long_edge) if width <= height else (long_edge, edge)
    if size == image.size:
        return image
    if long_edge > 64 * edge:  # a needle: only its middle survives the crop, so resize only that
        keep = 4 * short + (long - 4 * short) % 2  # an even rest leaves the middle where it is
        start = (long - keep) // 2
        upright = (0, start, width, start + keep)
        box = upright if width <= height else (start, 0, start + keep, height)
        return _resize_shortest_edge(image.crop(box), edge)
    return image.resize(size, Image.Resampling.BICUBIC)


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
