"""Collects an importance matrix: the float32 decoder runs calibration data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mobilevlm.console.progress import Advance
from mobilevlm.export.calibration.decoder_layers import watch_decoder
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.calibration.statistics import sample_groups
from mobilevlm.export.gguf.decoder import by_member
from mobilevlm.export.gguf.imatrix import ImportanceMatrix, InputStatistics
from mobilevlm.gguf.names import decoder_entries
from mobilevlm.model import Model

TIED_HEAD = {"decoder.lm_head.weight": "token_embd.weight"}
"""Name in llama.cpp of a head that is the embedding table."""


def collect(
    model: Model, samples: Sequence[Sample], dataset: str, advance: Advance
) -> ImportanceMatrix:
    """Statistics of the inputs of every decoder matrix, the head's too. ``dataset``: its name for
    the file; ``advance`` is called with the number of samples done.

    Raises:
        PromptError: a sample does not fit into the context.
        ImageError: an image cannot be read.
        MobileVLMError: an activation is infinite or no number.
    """
    entries = list(decoder_entries(model.spec.decoder))
    names = TIED_HEAD | {entry.ours: entry.theirs for entry in entries}
    squares: dict[str, NDArray[np.float64]] = {}
    count = 0
    for group in sample_groups(model, samples):
        positions = 0
        for block in watch_decoder(model, group, lambda _: True, hessian=False):
            for name, found in block.items():
                theirs, positions = names[f"{name}.weight"], found.count
                added = found.mean_square.astype(np.float64) * found.count
                squares[theirs] = squares.get(theirs, 0.0) + added
        count += positions
        advance(len(group))
    statistics = {
        entry.theirs: InputStatistics(squares[entry.theirs].astype(np.float32), count)
        for entry in entries
        if entry.theirs in squares
    }
    for entry in entries:
        if entry.theirs in statistics and entry.groups is not None and entry.groups.axis == 1:
            ours = statistics[entry.theirs].squares
            statistics[entry.theirs] = InputStatistics(by_member(ours, entry.groups), count)
    return ImportanceMatrix(statistics, (dataset,), len(samples), count // len(samples))
