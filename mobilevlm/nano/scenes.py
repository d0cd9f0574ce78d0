"""Scenes: procedural images described as data, fully determined by a seed.

In the spirit of CLEVR and ShapeWorld: a few flat shapes on a varied background, each in its own
cell of a 3x3 grid (so that every spatial word has one meaning), sometimes with a word or number.
``drawing.py`` turns a scene into pixels, ``questions.py`` into captions and questions; nothing but
the scene is needed for either, so the truth of an answer never depends on the image.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

IMAGE_SIZE = 192
"""Edge of a rendered image in pixels; 24 patches of 8."""
CELL = IMAGE_SIZE // 3

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SIZES = ("small", "medium", "large")
POSITIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
"""Name of each grid cell, row by row."""

RADII = {"small": 11.0, "medium": 18.0, "large": 26.0}
"""Half the extent of a shape in pixels."""

HELD_OUT = frozenset((COLORS[i], SHAPES[(i * 3 + 1) % len(SHAPES)]) for i in range(len(COLORS)))
"""Colour and shape combinations that training never shows nor names: one per colour and shape."""

WORDS = (
    "ant", "apple", "baby", "ball", "bat", "bear", "bed", "bell", "bird", "blue",
    "boat", "book", "box", "boy", "bus", "cake", "car", "cat", "city", "cloud",
    "cold", "cow", "cup", "day", "desk", "dog", "door", "duck", "egg", "exit",
    "farm", "fire", "fish", "frog", "game", "girl", "goat", "gold", "hand", "hat",
    "hello", "home", "horse", "hot", "house", "ice", "jam", "key", "king", "kite",
    "lake", "lamp", "leaf", "left", "lion", "love", "map", "milk", "moon", "mouse",
    "nest", "net", "night", "no", "open", "owl", "park", "pen", "pig", "pizza",
    "queen", "rain", "red", "right", "road", "salt", "sea", "ship", "shoe", "shop",
    "snow", "song", "star", "stop", "sun", "tea", "time", "toy", "tree", "up",
    "van", "wall", "water", "wind", "wolf", "yes", "yo-yo", "zebra", "zero", "zoo",
)  # fmt: skip
"""Words a scene may show; numbers have one to three digits."""

FONTS = ("regular", "bold", "slanted", "spaced", "outline", "pixel")
"""Ways to draw text with the fonts that ship inside Pillow."""

BACKGROUNDS = ("plain", "gradient", "radial", "stripes", "checks", "blotches")

Split = Literal["train", "evaluation"]

TRAINING_SEEDS = 2_000_000_000
"""Training scenes use seeds below this; evaluation scenes use seeds from here on."""


@dataclass(frozen=True)
class Item:
    """One shape."""

    shape: str
    color: str
    size: str
    cell: int
    """Index into POSITIONS."""
    x: float
    y: float
    """Centre in pixels."""
    angle: float
    """Degrees, counter-clockwise."""
    tint: tuple[int, int, int]
    """Number added to each channel of the colour's RGB value."""

    @property
    def radius(self) -> float:
        return RADII[self.size]

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3

    @property
    def name(self) -> str:
        """For example ``red circle``."""
        return f"{self.color} {self.shape}"

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class Label:
    """A word or number; it fills one row of the grid, where no shape is then."""

    text: str
    """Lower case, whatever is drawn."""
    capitals: bool
    font: str
    row: int
    x: float
    y: float
    height: int
    """Font size in pixels."""
    angle: float
    dark: bool
    """Dark letters on the background, else light ones."""


@dataclass(frozen=True)
class Background:
    """Mix of two colours behind the shapes."""

    kind: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float
    period: float
    """Pixels per stripe, check or blotch."""


@dataclass(frozen=True)
class Scene:
    """Everything an image shows; ``seed`` also fixes its noise."""

    seed: int
    background: Background
    items: tuple[Item, ...]
    """In reading order."""
    label: Label | None
    light: tuple[float, float, float]
    """Brightness slope along x, along y, and overall gain."""
    noise: float
    """Standard deviation, in 8-bit steps."""
    blur: float
    """Radius in pixels."""


def sample_scene(seed: int, split: Split = "train") -> Scene:
    """The scene of ``seed``.

    Training scenes never hold a combination of HELD_OUT; evaluation scenes hold them about half
    of the time, so that many evaluation questions are about something never seen.

    Raises:
        ValueError: the seed belongs to the other split.
    """
    if (seed < TRAINING_SEEDS) != (split == "train"):
        raise ValueError(f"seed {seed} does not belong to the {split} split")
    rng = random.Random(seed)
    label = _sample_label(rng) if rng.random() < 0.4 else None
    cells = [cell for cell in range(9) if label is None or cell // 3 != label.row]
    count = min(rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)), len(cells))
    if label is not None:
        count = min(count, rng.choice((0, 1, 1, 2, 2, 3, 4, 5)))
    kinds = _sample_kinds(rng, count, split)
    items = [
        _sample_item(rng, color, shape, cell)
        for (color, shape), cell in zip(kinds, rng.sample(cells, count), strict=True)
    ]
    return Scene(
        seed=seed,
        background=_sample_background(rng),
        items=tuple(sorted(items, key=lambda item: item.cell)),
        label=label,
        light=(rng.uniform(-0.22, 0.22), rng.uniform(-0.22, 0.22), rng.uniform(0.86, 1.1)),
        noise=rng.choice((0.0, 2.0, 5.0, 9.0)),
        blur=rng.choice((0.0, 0.0, 0.5, 0.9)),
    )


def _sample_kinds(rng: random.Random, count: int, split: Split) -> list[tuple[str, str]]:
    """Colour and shape of each item; shared colours or shapes make counting worth asking."""
    theme = rng.choice(("none", "none", "shape", "color", "both"))
    repeats = rng.randint(2, count) if count >= 2 and theme != "none" else 0
    color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        repeated = len(kinds) < repeats
        kind = (
            color if repeated and theme in ("color", "both") else rng.choice(COLORS),
            shape if repeated and theme in ("shape", "both") else rng.choice(SHAPES),
        )
        if kind in HELD_OUT and split == "train":
            color, shape = (kind[0], rng.choice(SHAPES)) if theme == "both" else (color, shape)
            continue
        if kind not in HELD_OUT and split == "evaluation" and rng.random() < 0.5:
            held_out = [k for k in sorted(HELD_OUT) if _fits(k, repeated, theme, color, shape)]
            kind = rng.choice(held_out) if held_out else kind
        kinds.append(kind)
    return kinds


def _fits(kind: tuple[str, str], repeated: bool, theme: str, color: str, shape: str) -> bool:
    if not repeated:
        return True
    return (theme == "shape" or kind[0] == color) and (theme == "color" or kind[1] == shape)


def _sample_item(rng: random.Random, color: str, shape: str, cell: int) -> Item:
    size = rng.choice(SIZES)
    jitter = 0.85 * (CELL / 2 - RADII[size])
    return Item(
        shape=shape,
        color=color,
        size=size,
        cell=cell,
        x=CELL * (cell % 3 + 0.5) + rng.uniform(-jitter, jitter),
        y=CELL * (cell // 3 + 0.5) + rng.uniform(-jitter, jitter),
        angle=rng.uniform(-18, 18),
        tint=(rng.randint(-14, 14), rng.randint(-14, 14), rng.randint(-14, 14)),
    )


def _sample_label(rng: random.Random) -> Label:
    if rng.random() < 0.6:
        text = rng.choice(WORDS)
    else:
        text = str(rng.randrange(10 ** rng.choice((1, 2, 2, 3))))
    row = rng.randrange(3)
    return Label(
        text=text,
        capitals=rng.random() < 0.5,
        font=rng.choice(FONTS),
        row=row,
        x=IMAGE_SIZE / 2 + rng.uniform(-16, 16),
        y=CELL * (row + 0.5) + rng.uniform(-6, 6),
        height=rng.randint(30, 44),
        angle=rng.uniform(-6, 6),
        dark=rng.random() < 0.5,
    )


def _sample_background(rng: random.Random) -> Background:
    return Background(
        kind=rng.choice(BACKGROUNDS),
        first=_background_color(rng),
        second=_background_color(rng),
        angle=rng.uniform(0, 180),
        period=rng.uniform(14, 48),
    )


def _background_color(rng: random.Random) -> tuple[int, int, int]:
    """A muted middle tone: every one of COLORS stands out from it."""
    base = rng.randint(112, 176)
    red, green, blue = (base + rng.randint(-22, 22) for _ in range(3))
    return red, green, blue
