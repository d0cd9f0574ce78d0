"""Simple scenes: one to three shapes on grey in 48 x 48 pixels, for the model that also draws.

The same shapes, colours and places as in scenes.py. What is drawn has large shapes in the middle of
their cells, so that an image is a grid of few different patches; what is seen is varied.
"""

from __future__ import annotations

import functools
import random

import numpy as np
import numpy.typing as npt

from mobilevlm.nano.drawing import RGB, item_mask
from mobilevlm.nano.questions import at, with_article
from mobilevlm.nano.scenes import (
    CELL,
    COLORS,
    SHAPES,
    TRAINING_SEEDS,
    Background,
    Item,
    Scene,
    Split,
)

EDGE = 48
"""Pixels of an image's edge."""
SCALE = 4
"""Pixels of scenes.py for one here."""
PATCH = 8
"""Pixels of the edge of what one code stands for."""
GRID = EDGE // PATCH
GREY = 144
NUM_CODES = 256
VARIANTS = 16
"""Places and angles of a shape within its cell."""

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def simple_scene(seed: int, split: Split = "train") -> Scene:
    """Return the simple scene of a seed.

    Raises:
        ValueError: the seed belongs to the other split.
    """
    if (seed < TRAINING_SEEDS) != (split == "train"):
        raise ValueError(f"seed {seed} does not belong to the {split} split")
    rng = random.Random(seed)
    cells = sorted(rng.sample(range(9), rng.choice((1, 2, 2, 3, 3))))
    items = (_item(rng.choice(SHAPES), rng.choice(COLORS), cell) for cell in cells)
    grey = (GREY,) * 3
    background = Background("plain", grey, grey, 0.0, 20.0)
    return Scene(seed, background, tuple(items), None, (0.0, 0.0, 1.0), 0.0, 0.0)


def _item(shape: str, color: str, cell: int, size: str = "large") -> Item:
    x, y = CELL * (cell % 3 + 0.5), CELL * (cell // 3 + 0.5)
    return Item(shape, color, size, cell, x, y, 0.0, (0, 0, 0))


def simple_caption(scene: Scene) -> str:
    """Return what the scene shows, in reading order: the prompt that it is drawn from."""
    parts = [f"{with_article(item.name)} {at(item.cell)}" for item in scene.items]
    head = ", ".join(parts[:-1])
    return f"{head} and {parts[-1]}" if head else parts[-1]


def draw_exactly(scene: Scene) -> Pixels:
    """Return the image of a scene as it is drawn from its caption ``(48, 48, 3)``."""
    canvas = np.full((EDGE, EDGE, 3), GREY, np.float32)
    for item in scene.items:
        _blend(canvas, item, _coverage(item.shape, "large", 0), np.zeros(3, np.int64))
    return (canvas + 0.5).astype(np.uint8)


def draw_varied(scene: Scene, seed: int) -> Pixels:
    """Return an image of a scene with other sizes, angles, backgrounds, light and noise."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(112, 177) + rng.integers(-22, 23, 3)
    if rng.random() < 0.3:
        ground = np.full(3, GREY)
    canvas = np.broadcast_to(ground.astype(np.float32), (EDGE, EDGE, 3)).copy()
    for item in scene.items:
        size = "medium" if rng.random() < 0.3 else "large"
        mask = _coverage(item.shape, size, int(rng.integers(VARIANTS)))
        _blend(canvas, item, mask, rng.integers(-14, 15, 3))
    canvas *= rng.uniform(0.86, 1.1)
    canvas += rng.choice((0.0, 1.0, 3.0)) * rng.standard_normal(canvas.shape, np.float32)
    image: Pixels = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return image


def _blend(canvas: Floats, item: Item, mask: Floats, tint: npt.NDArray[np.int64]) -> None:
    edge = EDGE // 3
    row, column = edge * item.row, edge * item.column
    area = canvas[row : row + edge, column : column + edge]
    color = np.clip(np.add(RGB[item.color], tint), 0, 255).astype(np.float32)
    area += mask[:, :, None] * (color - area)


@functools.cache
def _coverage(shape: str, size: str, variant: int) -> Floats:
    """Return the coverage of a shape in its cell ``(16, 16)``; variant 0 is in the middle."""
    rng = random.Random(f"{shape} {size} {variant}")
    item = _item(shape, "red", 4, size)
    reach = 0.85 * (CELL / 2 - item.radius) if variant else 0.0
    angle = rng.uniform(-18, 18) if variant else 0.0
    x, y = round(rng.uniform(-reach, reach)), round(rng.uniform(-reach, reach))
    moved = Item(shape, "red", size, 4, item.x, item.y, angle, (0, 0, 0))
    mask = item_mask(moved)
    whole = np.zeros((CELL + 128, CELL + 128), np.float32)
    top, left = (CELL + 128 - len(mask)) // 2 + y, (CELL + 128 - len(mask)) // 2 + x
    whole[top : top + len(mask), left : left + len(mask)] = mask
    cell = whole[64 : 64 + CELL, 64 : 64 + CELL]
    reduced: Floats = cell.reshape(CELL // SCALE, SCALE, CELL // SCALE, SCALE).mean((1, 3))
    return reduced


@functools.cache
def patches() -> Floats:
    """Return the patches that codes stand for ``(256, 8 * 8 * 3)``: the empty one, and quarters of
    all shapes in all colours, of two that are nearly the same one."""
    found = [np.full(PATCH * PATCH * 3, GREY, np.float32)]
    for shape in SHAPES:
        for color in COLORS:
            scene = simple_scene(0)
            one = Scene(**{**vars(scene), "items": (_item(shape, color, 0),)})
            grid = in_patches(draw_exactly(one)).reshape(GRID, GRID, -1)
            found += [grid[row, column] for row in (0, 1) for column in (0, 1)]
    while len(found) > NUM_CODES:
        table = np.stack(found)
        squares = (table**2).sum(1)
        distance = squares[:, None] + squares[None, :] - 2 * table @ table.T
        np.fill_diagonal(distance, np.inf)
        found.pop(max(divmod(int(distance.argmin()), len(table))))
    return np.stack(found)


def patch_vectors(size: int) -> Floats:
    """Return vectors of the codes ``(256, size)``, near for patches that look alike: three channels
    for the colour of a patch's shape, the others for its outline."""
    contrast = (patches() - GREY).reshape(NUM_CODES, PATCH * PATCH, 3)
    left, strength, right = np.linalg.svd(contrast, full_matrices=False)
    sign = np.sign(left[:, :, 0].sum(1))
    masks = left[:, :, 0] * (sign * strength[:, 0])[:, None]
    masks /= np.maximum(np.abs(masks).max(1, keepdims=True), 1e-6)
    colors = right[:, 0] * (sign * strength[:, 0])[:, None] / 500
    centred = masks - masks.mean(0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    outlines = centred @ axes[: size - 3].T / spread[: size - 3] * NUM_CODES**0.5 / 2
    return np.concatenate([colors, outlines], axis=1).astype(np.float32)


def in_patches(image: Pixels) -> Floats:
    """Return an image as its patches, row by row ``(36, 8 * 8 * 3)``."""
    grid = image.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(GRID * GRID, -1).astype(np.float32)


def codes_of(image: Pixels) -> npt.NDArray[np.int64]:
    """Return the code of each patch ``(36,)``: the nearest one's number."""
    table, given = patches(), in_patches(image)
    distance = (table**2).sum(1)[None, :] - 2 * given @ table.T
    codes: npt.NDArray[np.int64] = distance.argmin(1)
    return codes
