"""Dense targets for the tower: what stands at each of the 12x12 visual tokens.

Real MobileVLM begins with a CLIP tower that already sees. Ours starts from nothing, so a first
stage teaches it to name, at every visual token, the shape, colour and size that cover it, whether
a shape's centre is there, and which character is (two per token: letters may be narrow).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mobilevlm.nano.drawing import glyphs
from mobilevlm.nano.scenes import COLORS, IMAGE_SIZE, POSITIONS, SHAPES, SIZES, Scene

GRID = 12
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz-"
CLASSES = {
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 1,
    "size": len(SIZES) + 1,
    "center": 2,
    "left": len(CHARACTERS) + 1,
    "right": len(CHARACTERS) + 1,
    "place": len(POSITIONS),
}
"""Classes per head; 0 is 'nothing', but for ``place``: the cell of the 3x3 grid."""

Targets = npt.NDArray[np.int64]


def dense_targets(scene: Scene) -> Targets:
    """Class of each visual token for each head of CLASSES: ``(heads, GRID * GRID)``."""
    targets = np.zeros((len(CLASSES), GRID, GRID), np.int64)
    thirds = np.arange(GRID) * 3 // GRID
    targets[6] = 3 * thirds[:, None] + thirds[None, :]
    edge = IMAGE_SIZE / GRID
    centers = (np.arange(GRID) + 0.5) * edge
    for item in scene.items:
        distance = np.hypot(centers[None, :] - item.x, centers[:, None] - item.y)
        row, column = int(item.y // edge), int(item.x // edge)
        covered = distance < item.radius * 0.9
        covered[row, column] = True
        targets[0][covered] = 1 + SHAPES.index(item.shape)
        targets[1][covered] = 1 + COLORS.index(item.color)
        targets[2][covered] = 1 + SIZES.index(item.size)
        targets[3, row, column] = 1
    if scene.label is not None:
        placed = glyphs(scene.label)
        width = placed[-1][2] + placed[-1][1].shape[1]
        turn = math.radians(scene.label.angle)
        for character, mask, left in placed:
            offset = left + mask.shape[1] / 2 - width / 2
            x = scene.label.x + offset * math.cos(turn)
            y = scene.label.y - offset * math.sin(turn)
            row, half = int(y // edge), int(x // (edge / 2))
            if 0 <= row < GRID and 0 <= half < 2 * GRID:
                head = 4 + half % 2
                targets[head, row, half // 2] = 1 + CHARACTERS.index(character.lower())
    return targets.reshape(len(CLASSES), GRID * GRID)
