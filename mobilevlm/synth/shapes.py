"""What synthetic checkpoints are made of: shapes of tensors, by name, and the files around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """The weights of one folder."""

    folder: str
    """Inside the checkpoint; empty: itself."""
    shapes: Shapes
    depth: int
    """Layers, whose number sets the scale of what adds to a residual stream."""
    seed: str
    """Tells its random numbers from those of the other parts."""


@dataclass(frozen=True)
class Layout:
    """A checkpoint."""

    parts: tuple[Part, ...]
    write_settings: Callable[[Path, str], None]
    """Everything but the weights; is given the folder and the configuration's name."""


def matrix(name: str, in_size: int, out_size: int) -> Shapes:
    """A linear layer without bias."""
    return {f"{name}.weight": (out_size, in_size)}


def weight(name: str, size: int) -> Shapes:
    """A norm without bias."""
    return {f"{name}.weight": (size,)}


def linear(name: str, in_size: int, out_size: int) -> Shapes:
    """A linear layer with bias."""
    return {f"{name}.weight": (out_size, in_size), f"{name}.bias": (out_size,)}


def norm(name: str, size: int) -> Shapes:
    """A norm with bias."""
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """As the checkpoints of the hub have it."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
