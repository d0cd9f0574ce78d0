"""Pixels of a scene: anti-aliased shapes, text, background, light, noise and blur.

Shapes and text are drawn as coverage masks at four times the size and reduced, so edges are
smooth; everything is composed in float and rounded once.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mobilevlm.nano.scenes import IMAGE_SIZE, Background, Item, Label, Scene

OVERSAMPLING = 4

RGB: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (245, 132, 18),
    "yellow": (246, 222, 40),
    "green": (36, 150, 52),
    "blue": (32, 74, 206),
    "purple": (134, 40, 164),
    "white": (248, 248, 248),
    "black": (22, 22, 22),
}

Floats = npt.NDArray[np.float32]
Point = tuple[float, float]


def render(scene: Scene) -> Image.Image:
    """The image of a scene: RGB, ``IMAGE_SIZE`` x ``IMAGE_SIZE``."""
    canvas = _background(scene.background, scene.seed)
    for item in scene.items:
        color = np.clip(np.add(RGB[item.color], item.tint), 0, 255)
        _paint(canvas, item_mask(item), round(item.x), round(item.y), color)
    if scene.label is not None:
        color = np.array((24, 24, 30) if scene.label.dark else (250, 250, 244))
        mask = label_mask(scene.label)
        _paint(canvas, mask, round(scene.label.x), round(scene.label.y), color)
    along = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    slope_x, slope_y, gain = scene.light
    canvas *= (gain + slope_x * along[None, :] + slope_y * along[:, None])[:, :, None]
    if scene.noise:
        noise = np.random.default_rng(scene.seed).standard_normal(canvas.shape, np.float32)
        canvas += scene.noise * noise
    image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(scene.blur)) if scene.blur else image


def item_mask(item: Item) -> Floats:
    """Coverage of a shape, 0..1, ``(edge, edge)`` with the centre in the middle."""
    half = math.ceil(item.radius) + 3
    edge = 2 * half * OVERSAMPLING
    image = Image.new("L", (edge, edge))
    draw = ImageDraw.Draw(image)
    center, radius = edge / 2, item.radius * OVERSAMPLING
    offset_x = (item.x - round(item.x)) * OVERSAMPLING
    offset_y = (item.y - round(item.y)) * OVERSAMPLING
    turn = math.radians(item.angle)
    cosine, sine = math.cos(turn), math.sin(turn)

    def place(point: Point) -> Point:
        """From the unit square (y down) to mask pixels."""
        x, y = point[0] * radius, point[1] * radius
        return (
            center + offset_x + x * cosine + y * sine,
            center + offset_y - x * sine + y * cosine,
        )

    def disc(point: Point, size: float, fill: int) -> None:
        x, y = place(point)
        reach = size * radius
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)

    if item.shape == "circle":
        disc((0, 0), 0.95, 255)
    elif item.shape == "ring":
        disc((0, 0), 1.0, 255)
        disc((0, 0), 0.55, 0)
    elif item.shape == "moon":
        disc((0, 0), 1.0, 255)
        disc((0.45, -0.1), 0.8, 0)
    else:
        draw.polygon([place(point) for point in outline(item.shape)], fill=255)
    return _coverage(image.reduce(OVERSAMPLING))


@functools.cache
def outline(shape: str) -> tuple[Point, ...]:
    """Corners of a polygonal shape in the square from -1 to 1, y down.

    Raises:
        KeyError: the shape is round or unknown.
    """
    heart = [2 * math.pi * step / 48 for step in range(48)]
    spokes = [(0.42 if step % 2 else 1.05, math.pi * step / 5) for step in range(10)]
    corners: dict[str, list[Point]] = {
        "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
        "triangle": [(0, -1), (0.98, 0.78), (-0.98, 0.78)],
        "star": [(reach * math.sin(turn), -reach * math.cos(turn)) for reach, turn in spokes],
        "heart": [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 15.5,
            )
            for t in heart
        ],
        "cross": [
            (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
            (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32),
        ],
    }  # fmt: skip
    return tuple(corners[shape])


def glyphs(label: Label) -> tuple[tuple[str, Floats, float], ...]:
    """The characters of a label: ``(character, coverage (height, width), left edge)``.

    All have the same height; the edges start at 0 and are already scaled to fit the image.
    """
    text = label.text.upper() if label.capitals else label.text
    masks = [_glyph(character, label.font, label.height) for character in text]
    gap = 5 if label.font == "spaced" else 1
    width = sum(mask.shape[1] for mask in masks) + gap * (len(masks) - 1)
    scale = min(1.0, (IMAGE_SIZE - 36) / width)
    placed, left = [], 0.0
    for character, mask in zip(text, masks, strict=True):
        if scale < 1:
            size = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))
            resized = Image.fromarray((mask * 255).astype(np.uint8))
            mask = _coverage(resized.resize(size, Image.Resampling.BICUBIC))
        placed.append((character, mask, left))
        left += mask.shape[1] + gap * scale
    return tuple(placed)


def label_mask(label: Label) -> Floats:
    """Coverage of a label, 0..1, with its centre in the middle."""
    parts = glyphs(label)
    _, last, left = parts[-1]
    width = round(left) + last.shape[1]
    coverage = np.zeros((last.shape[0], width + 1), np.float32)
    for _, mask, left in parts:
        start = round(left)
        area = coverage[:, start : start + mask.shape[1]]
        np.maximum(area, mask[:, : area.shape[1]], out=area)
    image = Image.fromarray((coverage * 255).astype(np.uint8))
    image = image.rotate(label.angle, Image.Resampling.BICUBIC, expand=True)
    return _coverage(image)


@functools.cache
def _glyph(character: str, font: str, height: int) -> Floats:
    """Coverage of one character, cut to its own width; the rows are those of the whole font."""
    if font == "pixel":
        bitmap = ImageFont.load_default_imagefont()
        left, _, right, bottom = (int(edge) for edge in bitmap.getbbox(character))
        image = Image.new("L", (right - left, bottom))
        ImageDraw.Draw(image).text((0, 0), character, fill=255, font=bitmap)
        factor = height / bottom
        image = image.resize((round(image.width * factor), height), Image.Resampling.BOX)
    else:
        stroke = {"bold": 1.2, "outline": 1.6}.get(font, 0.25)
        face = ImageFont.load_default(height * 2)
        image = Image.new("L", (4 * height, 3 * height))
        draw = ImageDraw.Draw(image)
        draw.text((height, height // 4), character, 255, face, stroke_width=stroke * 2)
        if font == "outline":
            draw.text((height, height // 4), character, 0, face, stroke_width=0)
        if font == "slanted":
            shear = (1, 0.25, -0.25 * height, 0, 1, 0)
            image = image.transform(
                image.size, Image.Transform.AFFINE, shear, Image.Resampling.BICUBIC
            )
        image = image.reduce(2)
    mask = _coverage(image)
    columns = np.flatnonzero(mask.max(axis=0) > 0.05)
    return mask[:, columns[0] : columns[-1] + 1]


def _coverage(image: Image.Image) -> Floats:
    """The values of a greyscale image as shares from 0 to 1."""
    return np.asarray(image, np.float32) * np.float32(1 / 255)


def _paint(canvas: Floats, mask: Floats, x: int, y: int, color: npt.NDArray[np.int64]) -> None:
    """Blends a colour into ``canvas`` where ``mask``, centred on (x, y), covers it."""
    height, width = mask.shape
    top, left = y - height // 2, x - width // 2
    rows = slice(max(0, top), min(IMAGE_SIZE, top + height))
    columns = slice(max(0, left), min(IMAGE_SIZE, left + width))
    part = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    area = canvas[rows, columns]
    area += part[:, :, None] * (color.astype(np.float32) - area)


def _background(background: Background, seed: int) -> Floats:
    """``(IMAGE_SIZE, IMAGE_SIZE, 3)`` between the two colours of the background."""
    along = np.arange(IMAGE_SIZE, dtype=np.float32)
    turn = math.radians(background.angle)
    across = math.cos(turn) * along[None, :] + math.sin(turn) * along[:, None]
    down = -math.sin(turn) * along[None, :] + math.cos(turn) * along[:, None]
    mix: Floats
    if background.kind == "plain":
        mix = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    elif background.kind == "gradient":
        mix = (across - across.min()) / (across.max() - across.min())
    elif background.kind == "radial":
        middle = IMAGE_SIZE / 2
        distance = np.hypot(along[None, :] - middle, along[:, None] - middle)
        mix = (distance / (1.42 * middle)).astype(np.float32)
    elif background.kind == "stripes":
        mix = np.float32(0.5) + np.float32(0.5) * np.sin(across * (2 * math.pi / background.period))
    elif background.kind == "checks":
        cells = np.floor(across / background.period) + np.floor(down / background.period)
        mix = np.asarray(cells % 2, np.float32)
    else:
        edge = max(3, round(IMAGE_SIZE / background.period))
        coarse = np.random.default_rng(seed + 1).random((edge, edge), np.float32)
        soft = Image.fromarray((coarse * 255).astype(np.uint8)).resize(
            (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC
        )
        mix = _coverage(soft)
    first, second = np.array(background.first), np.array(background.second)
    canvas: Floats = (first + mix[:, :, None] * (second - first)).astype(np.float32)
    return canvas
