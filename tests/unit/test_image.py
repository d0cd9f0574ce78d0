"""Images of every sort as pixels, compared with a direct computation in Pillow."""

from __future__ import annotations

import io
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fixture_named
from numpy.typing import NDArray
from PIL import Image

from mobilevlm.errors import ImageError
from mobilevlm.image import MAX_PADDED_EDGE, normalize, open_image, preprocess
from mobilevlm.input_spec import FixedImage

pytestmark = pytest.mark.pure

Pixels = NDArray[np.uint8]

PAD = FixedImage(
    336, 336, "pad", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
CROP = replace(PAD, aspect="crop")


def noise(width: int, height: int, channels: int = 3) -> Pixels:
    """Noise over a gradient: neighbouring pixels and the two ends differ."""
    values = np.random.default_rng(0).integers(0, 128, (height, width, channels))
    values += np.linspace(0, 127, width * height).reshape(height, width, 1).astype(np.int64)
    return values.astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def directly(image: Image.Image, spec: FixedImage) -> Pixels:
    """The reference code's steps, one Pillow call each."""
    if spec.aspect == "pad":
        edge = max(image.size)
        square = Image.new("RGB", (edge, edge), (122, 116, 104))
        square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
        image = square
    short, long = sorted(image.size)
    resized = (spec.shortest_edge, int(spec.shortest_edge * long / short))
    size = resized if image.width <= image.height else resized[::-1]
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - spec.size) // 2, (image.height - spec.size) // 2
    return np.asarray(image.crop((left, top, left + spec.size, top + spec.size)))


SIZES = [(500, 318), (318, 500), (337, 336), (336, 336), (640, 640), (20, 31), (1000, 16),
         (16, 1000), (1, 1), (1, 7), (2, 1)]  # fmt: skip


@pytest.mark.parametrize("size", [*SIZES, (1999, 3), (1, 400)], ids=str)
def test_padded_pixels_equal_the_reference_steps(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    assert np.array_equal(preprocess(image, PAD), directly(image, PAD))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cropped_pixels_equal_the_reference_steps(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    assert np.array_equal(preprocess(image, CROP), directly(image, CROP))


@pytest.mark.parametrize("size", [(2, 401), (400, 2), (1, 99), (3, 400), (500, 4)], ids=str)
def test_a_needle_is_cropped_as_if_it_had_been_resized_whole(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    found = preprocess(image, CROP).astype(int)
    # One step: the whole is resized by int(336 * long / short) / long, a hair off 336 / short.
    assert np.abs(found - directly(image, CROP)).max() <= 1


def test_a_tower_with_a_larger_shortest_edge_cuts_the_border() -> None:
    image, spec = Image.fromarray(noise(500, 318)), replace(CROP, size=224, shortest_edge=256)
    assert np.array_equal(preprocess(image, spec), directly(image, spec))
    spec = replace(spec, aspect="pad")
    assert np.array_equal(preprocess(image, spec), directly(image, spec))


def test_a_crop_larger_than_the_picture_is_padded_with_black() -> None:
    image = Image.new("RGB", (100, 100), (10, 20, 30))
    pixels = preprocess(image, replace(CROP, size=336, shortest_edge=224))
    assert pixels.shape == (336, 336, 3)
    assert (pixels[56:280, 56:280] == (10, 20, 30)).all()
    assert not pixels[:56].any() and not pixels[:, 280:].any()


@pytest.mark.parametrize("spec", [PAD, CROP], ids=["pad", "crop"])
def test_a_picture_of_48_million_pixels_is_read(spec: FixedImage) -> None:
    image = Image.linear_gradient("L").resize((8000, 6000)).convert("RGB")
    pixels = preprocess(open_image(encoded(image, "JPEG")), spec)
    column = pixels[:, 168, 0].astype(int)
    first, last = (42, 293) if spec is PAD else (0, 335)  # rows of the picture itself
    assert column[first + 1] < 10 and column[last - 1] > 245
    assert (np.diff(column[first + 1 : last]) >= -1).all()  # a gradient, but for JPEG's rounding


@pytest.mark.parametrize("size", [(1, 12000), (30000, 1), (20000, 100)], ids=str)
@pytest.mark.parametrize("spec", [PAD, CROP], ids=["pad", "crop"])
def test_extreme_aspect_ratios_stay_small(size: tuple[int, int], spec: FixedImage) -> None:
    pixels = preprocess(Image.new("RGB", size, (255, 0, 0)), spec)
    assert pixels.shape == (336, 336, 3)
    expected = (255, 0, 0) if spec is CROP else spec.pad_color
    assert (pixels[0, 0] == expected).all()


def test_a_picture_too_long_to_pad_is_refused_in_one_line() -> None:
    image = Image.new("RGB", (2, MAX_PADDED_EDGE + 1))
    with pytest.raises(ImageError, match=r"2 × 32769 pixels.*cut it first"):
        preprocess(image, PAD)
    assert preprocess(image, CROP).shape == (336, 336, 3)


def test_normalize_gives_channels_first_by_mean_and_deviation() -> None:
    pixels = noise(336, 336)
    found = normalize(pixels, PAD)
    expected = (pixels.transpose(2, 0, 1) / 255 - np.array(PAD.mean)[:, None, None]) / np.array(
        PAD.std
    )[:, None, None]
    assert found.shape == (3, 336, 336) and found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-6


# Modes of pictures. Alpha lies over white; 16 bits lose the lower 8.

GREY = noise(40, 30, 1)[..., 0]
ALPHA = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))


def over_white(color: Pixels, alpha: Pixels) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return color * share + 255 * (1 - share)


def test_grey_becomes_three_equal_channels() -> None:
    pixels = np.asarray(open_image(encoded(Image.fromarray(GREY))))
    assert np.array_equal(pixels, np.repeat(GREY[..., None], 3, axis=2))


def test_black_and_white_becomes_black_and_white() -> None:
    image = Image.fromarray(GREY).point(lambda value: 255 * (value > 128), "1")
    pixels = np.asarray(open_image(encoded(image)))
    assert np.array_equal(pixels[..., 0], np.where(GREY > 128, 255, 0))


def test_alpha_lies_over_white() -> None:
    color = noise(40, 30)
    image = Image.fromarray(np.dstack([color, ALPHA]), "RGBA")
    found = np.asarray(open_image(encoded(image)), float)
    assert np.abs(found - over_white(color, ALPHA)).max() <= 1  # rounding


def test_grey_with_alpha_lies_over_white() -> None:
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    found = np.asarray(open_image(encoded(image)), float)
    assert np.abs(found - over_white(GREY[..., None], ALPHA)).max() <= 1


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    pixels = np.asarray(open_image(encoded(image, transparency=0)))
    assert (pixels[0, 0] == (0, 0, 255)).all() and (pixels[1:] == 255).all()


def test_a_transparent_color_becomes_white() -> None:
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    pixels = np.asarray(open_image(encoded(image, transparency=(1, 2, 3))))
    assert (pixels[0, 0] == 9).all() and (pixels[1:] == 255).all()


def test_cmyk_is_converted() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = np.asarray(open_image(encoded(image, "TIFF")))
    assert (pixels == (255, 0, 0)).all()


def test_sixteen_bit_grey_is_scaled_even_where_it_is_dark() -> None:
    for values in (np.arange(1200) * 50, np.arange(1200) % 200):
        wide = values.reshape(30, 40).astype(np.uint16)
        pixels = np.asarray(open_image(encoded(Image.fromarray(wide))))
        assert np.abs(pixels[..., 1] - wide / 257).max() <= 1


# What each EXIF orientation does to the stored picture (EXIF 2.3, tag 0x0112).
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    color = noise(40, 30)
    data = encoded(Image.fromarray(color), exif=exif)
    assert np.array_equal(np.asarray(open_image(data)), TURNS[orientation](color))


# Every way to give a picture.


def test_path_text_bytes_image_and_array_give_the_same(tmp_path: Path) -> None:
    color = noise(40, 30)
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.fromarray(color)))
    for source in (path, str(path), path.read_bytes(), Image.fromarray(color), color):
        assert np.array_equal(np.asarray(open_image(source)), color)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_an_array_of_another_kind_is_refused(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match="expected uint8 of shape"):
        open_image(array)


# What is not an image.


def message_of(source: Any) -> str:
    with pytest.raises(ImageError) as caught:
        preprocess(open_image(source), PAD)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert message_of(tmp_path / "no.png") == f"{tmp_path}/no.png: no such image file"
    assert str(tmp_path) in message_of(tmp_path)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    assert message_of(path) == (
        f"{path}: not an image in a format that is read (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF …)"
    )
    path.write_bytes(b"")
    assert str(path) in message_of(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_picture_is_named(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(noise(200, 200)), kind)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    assert str(path) in message_of(path)


def test_a_picture_without_pixels_is_refused() -> None:
    assert "(0, 4, 3)" in message_of(np.zeros((0, 4, 3), np.uint8))
    assert "4 × 0 pixels" in message_of(Image.new("RGB", (4, 0)))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A PNG of 20000 × 20000 pixels in a few hundred bytes: only its header is read."""
    data = bytearray(encoded(Image.new("1", (1, 1))))
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path = tmp_path / "bomb.png"
    path.write_bytes(data)
    message = message_of(path)
    assert "bomb.png" in message and "pixels" in message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damage_gives_a_picture_or_one_line_but_never_another_error(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    whole = encoded(
        Image.fromarray(noise(24, 24)), kind, **({} if kind == "BMP" else {"exif": exif})
    )
    generator = random.Random(kind)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 6)):
            data[generator.randrange(min(len(data), 400))] = generator.randrange(256)
        if generator.random() < 0.3:
            del data[generator.randrange(len(data)) :]
        try:
            pixels = preprocess(open_image(bytes(data)), CROP)
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert pixels.shape == (336, 336, 3)


def test_fixture_pictures_are_cut_as_the_official_code_does() -> None:
    """Sizes as integers in preprocessor_config.json and a crop that is not a pad."""
    spec = fixture_named("llava_v1").model.spec.image.preparation
    assert isinstance(spec, FixedImage)
    assert (spec.size, spec.shortest_edge, spec.aspect) == (224, 224, "crop")


@pytest.mark.parametrize("size", [(31, 70), (60, 200), (1, 90), (70, 31), (100, 3000), (48, 500)])
@pytest.mark.parametrize("aspect", ["resize", "crop"])
def test_passes_of_resizing_are_in_pillows_order(
    aspect: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From version 13 on Pillow resizes the columns of tall images first."""
    monkeypatch.setattr("mobilevlm.image._STRIP_PIXELS", 1000)  # several strips
    width, height = size
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))
    spec = FixedImage(48, 48, aspect, (0.5,) * 3, (0.5,) * 3)
    if aspect == "resize":
        scaled = (48, 48)
    else:
        edges = 48, int(48 * max(size) / min(size))
        scaled = edges if width <= height else edges[::-1]
    if max(scaled) > 64 * 48:  # only the middle of a needle is resized
        return
    whole = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))
    top, left = (scaled[1] - 48) // 2, (scaled[0] - 48) // 2
    expected = whole[top : top + 48, left : left + 48]
    assert np.array_equal(preprocess(image, spec), expected)
