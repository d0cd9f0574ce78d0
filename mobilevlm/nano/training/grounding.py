"""Grounding targets: which cells of the grid hold what a noun phrase of a question means.

A decoder of four layers finds what a question is about in its last one, unless it is shown the way,
and then has none left to count or to compare. So training asks at the last token of each phrase
("red circle", "stars"), halfway through the decoder, where such things are. Nowhere is an answer.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from mobilevlm.nano.scenes import COLORS, POSITIONS, SHAPES, SIZES, Scene

CELLS = len(POSITIONS)

_PHRASE = re.compile(
    rf"\b(?:the|a|an|more|fewer|than|many) "
    rf"((?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(SHAPES)}|shape))"
    rf"(?:es|s)?\b(?! (?:at|on|in) the (?:top|bottom|left|right|center))"
)

Cells = npt.NDArray[np.float32]


def phrases(text: str) -> list[tuple[str, int]]:
    """Each noun phrase of a question in the singular, and where it ends in the text."""
    return [(found[1], found.end()) for found in _PHRASE.finditer(text)]


def cells_of(scene: Scene, name: str) -> Cells:
    """1 for each cell with an item that the name describes, float32 (CELLS)."""
    words = set(name.split()) - {"shape"}
    cells = np.zeros(CELLS, np.float32)
    for item in scene.items:
        cells[item.cell] = words <= {item.size, item.color, item.shape}
    return cells
