"""Mutated image files, opened and brought to the pixels of each kind of vision tower."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from fuzz.harness import Fuzzer
from fuzz.image_damage import damage
from mobilevlm.image import Room, open_image, preprocess, read_pixels
from mobilevlm.input_spec import FixedImage

SIZE = 56


def room_for(needed: float) -> Room:
    """Leave each image 96 MB."""
    return Room(96e6, "the fuzzer")


SPECS = tuple(
    FixedImage(SIZE, SIZE, aspect, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for aspect in ("pad", "crop", "resize")
)


def prepare(folder: Path) -> None:
    """Write small files of every format that Pillow writes, and of some that are refused."""
    generator = np.random.default_rng(0)
    smooth = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3) * 0.7
    color = Image.fromarray((smooth + generator.integers(0, 64, (30, 40, 3))).astype(np.uint8))
    alpha = color.convert("RGBA")
    alpha.putalpha(color.convert("L"))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "an image", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    forms: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (color, {"exif": exif}),
        "rgba.png": (alpha, {}),
        "palette.png": (color.convert("P"), {"transparency": 3}),
        "deep.png": (Image.fromarray(smooth[..., 0].astype(np.uint16) * 200), {}),
        "moving.png": (color, {"save_all": True, "append_images": [alpha.convert("RGB")] * 2}),
        "plain.jpg": (color, {"exif": exif}),
        "progressive.jpg": (color, {"progressive": True, "exif": exif}),
        "cmyk.jpg": (color.convert("CMYK"), {}),
        "grey.jpg": (color.convert("L"), {"restart_marker_blocks": 1}),
        "lossy.webp": (color, {"exif": exif}),
        "lossless.webp": (alpha, {"lossless": True}),
        "moving.webp": (color, {"save_all": True, "append_images": [alpha] * 2}),
        "plain.gif": (color, {}),
        "moving.gif": (color, {"save_all": True, "append_images": [alpha] * 2}),
        "raw.tif": (color, {"exif": exif}),
        "lzw.tif": (color, {"compression": "tiff_lzw"}),
        "deflate.tif": (alpha, {"compression": "tiff_deflate"}),
        "jpeg.tif": (color, {"compression": "jpeg"}),
        "fax.tif": (color.convert("1"), {"compression": "group4"}),
        "float.tif": (Image.fromarray((smooth[..., 0] / 255).astype(np.float32)), {}),
        "integer.tif": (Image.fromarray(smooth[..., 0].astype(np.int32) << 20), {}),
        "rgb.bmp": (color, {}),
        "palette.bmp": (color.convert("P"), {}),
        "rgb.ico": (alpha, {"sizes": [(16, 16), (32, 32)]}),
        "rgb.tga": (alpha, {"compression": "tga_rle"}),
        "rgb.ppm": (color, {}),
        "rgb.pcx": (color, {}),
        "rgb.sgi": (color, {}),
        "rgb.dds": (alpha, {}),
        "rgb.jp2": (color, {}),
        "rgb.avif": (alpha, {"exif": exif}),
        "rgb.qoi": (alpha, {}),
        "rgb.eps": (color, {}),
        "rgb.pdf": (color, {}),
    }
    for name, (image, options) in forms.items():
        kind = name.rpartition(".")[2]
        if not features.check({"avif": "avif", "webp": "webp", "jp2": "jpg_2000"}.get(kind, "pil")):
            continue
        try:
            image.save(folder / name, **options)
        except (KeyError, ValueError):  # a version of Pillow that does not write this format
            continue


def mutate(base: Path, random: random.Random, scratch: Path) -> bytes:
    """Damage one of the files."""
    path = random.choice(sorted(base.iterdir()))
    return damage(random, path.suffix[1:], path.read_bytes())


def attempt(content: bytes) -> None:
    """Bring a file to pixels in every way, within some memory; now and then through RGB."""
    for spec in SPECS:
        assert read_pixels(content, spec, room_for).shape == (SIZE, SIZE, 3)
    if len(content) % 8 == 0:
        whole = open_image(io.BytesIO(content), room_for)
        assert (preprocess(whole, SPECS[0]) == read_pixels(content, SPECS[0], room_for)).all()


FUZZER = Fuzzer(prepare, mutate, attempt)
