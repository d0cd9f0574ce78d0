"""The decoder stage in float with fixed shapes, of elementary operators: one graph for chunks of
the prompt, one for single tokens, with one file of weights. What accelerators take that know no
fixed point of 16 bits (Core ML)."""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mobilevlm.bundle import data_path
from mobilevlm.console.progress import Advance, ignore
from mobilevlm.export.formats import Written
from mobilevlm.export.graph.author import ChunkShape, author_static_decoder
from mobilevlm.model import Model
from mobilevlm.recipe import Recipe


def author_float_decoder(
    model: Model,
    recipe: Recipe,
    paths: Sequence[Path],
    shapes: Sequence[ChunkShape],
    data: Path,
    advance: Advance,
) -> Written:
    """Writes a graph for each shape to its path, and the weights of all to ``data``."""
    recipe = replace(recipe, experts="dense")
    written = None
    with tempfile.TemporaryDirectory(dir=data.parent, prefix=f".{data.name}.") as folder:
        for path, shape in zip(paths, shapes, strict=True):
            source = Path(folder) / data.name.removesuffix("_data")  # which the graphs refer to
            seen = ignore if written else advance
            made = author_static_decoder(model.weights, model.spec, recipe, source, shape, seen)
            if written is None:
                data_path(source).replace(data)
            else:
                assert filecmp.cmp(data_path(source), data, shallow=False), "weights by shape"
            written = made  # the last shape is that of a token
            source.replace(path)
    assert written is not None
    return written
