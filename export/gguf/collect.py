"""Collects an importance matrix: the float32 reference runs calibration data (needs torch).

Samples are run in groups of a bounded number of positions, and the reference is streamed layer by
layer, so memory holds one layer and a group's activations. Each group reads the checkpoint once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevlm.errors import MobileVLMError, PromptError
from mobilevlm.export.calibration import Sample, sample_ids
from mobilevlm.export.gguf.imatrix import ImportanceMatrix, InputStatistics
from mobilevlm.export.gguf.names import decoder_entries
from mobilevlm.families import Model
from mobilevlm.image import normalize, open_image, preprocess
from mobilevlm.progress import Advance
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.spec import IMAGE_TOKEN_ID

GROUP = 2048
"""Positions that are run at once; a longer sample is a group of its own."""


@dataclass(frozen=True)
class _Row:
    """A sample with its input ids, and the positions that they take with pictures expanded."""

    sample: Sample
    ids: list[int]
    length: int


class _Sums:
    """Adds up squared inputs by llama.cpp's name of the matrix."""

    def __init__(self) -> None:
        self.squares: dict[str, NDArray[np.float64]] = {}
        self.count = 0
        self.inside = torch.zeros(0)
        """Which places ``(rows, length)`` of the present group are no padding."""

    def add(self, name: str, inputs: Tensor) -> None:
        """``inputs``: ``(rows, length, in_size)``."""
        found = inputs[self.inside].double().square().sum(dim=0).numpy()
        self.squares[name] = self.squares.get(name, 0.0) + found


def collect(
    model: Model, samples: Sequence[Sample], dataset: str, advance: Advance
) -> ImportanceMatrix:
    """Statistics of the inputs of every decoder matrix, the head's too. ``dataset``: its name for
    the file; ``advance`` is called with the number of samples done.

    Raises:
        PromptError: a sample does not fit into the context.
        ImageError: a picture cannot be read.
        MobileVLMError: an activation is infinite or no number.
    """
    rows = [_row(model, sample, index) for index, sample in enumerate(samples, 1)]
    sums = _Sums()
    head = "token_embd.weight" if model.spec.decoder.tie_word_embeddings else "output.weight"
    with torch.no_grad():
        reference = load_reference(model, streamed=True)
        _watch(reference, sums)
        for group in _groups(rows):
            embeds = _embeddings(reference, group)
            length = max(len(row) for row in embeds)
            lengths = torch.tensor([len(row) for row in embeds])
            sums.inside = torch.arange(length) < lengths[:, None]
            sums.count += int(lengths.sum())
            # Padding stands behind: nothing before it sees it.
            padded = nn.utils.rnn.pad_sequence(embeds, batch_first=True)
            sums.add(head, reference.decoder.states(padded))
            advance(len(group))
    for name, squares in sums.squares.items():
        if not np.isfinite(squares).all():
            raise MobileVLMError(
                f"{model.folder}: inputs of {name!r} are infinite or no numbers on the calibration "
                f"data: the checkpoint may be damaged"
            )
    entries = {
        entry.theirs: InputStatistics(sums.squares[entry.theirs].astype(np.float32), sums.count)
        for entry in decoder_entries(model.spec.decoder)
        if entry.theirs in sums.squares
    }
    return ImportanceMatrix(entries, (dataset,), len(rows), sums.count // len(rows))


def _row(model: Model, sample: Sample, number: int) -> _Row:
    ids = sample_ids(model, sample)
    length = len(ids) + (model.spec.projector.num_tokens - 1) * ids.count(IMAGE_TOKEN_ID)
    if length > model.spec.decoder.context_length:
        raise PromptError(
            f"calibration sample {number} takes {length} tokens, the context holds "
            f"{model.spec.decoder.context_length}: shorten it"
        )
    return _Row(sample, ids, length)


def _groups(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Neighbours that take no more than GROUP places together, padding included."""
    group: list[_Row] = []
    for row in rows:
        longest = max([row.length, *(other.length for other in group)])
        if group and longest * (len(group) + 1) > GROUP:
            yield group
            group = []
        group.append(row)
    yield group


def _watch(reference: ReferenceModel, sums: _Sums) -> None:
    """Adds the inputs of every linear layer of the decoder but the head, which is not run."""
    names = {entry.ours: entry.theirs for entry in decoder_entries(reference.spec.decoder)}

    def watch(module: nn.Module, name: str) -> None:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            sums.add(name, inputs[0])

        module.register_forward_pre_hook(add)

    for name, module in reference.decoder.layers.named_modules(prefix="decoder.layers"):
        if isinstance(module, nn.Linear):
            watch(module, names[f"{name}.weight"])


def _embeddings(reference: ReferenceModel, group: Sequence[_Row]) -> list[Tensor]:
    """``(length, hidden_size)`` of each row. All pictures of a group pass the tower together."""
    spec = reference.spec.image
    pixels = [
        normalize(preprocess(open_image(image), spec), spec)
        for row in group
        for image in row.sample.images
    ]
    visual: list[Tensor] = []
    if pixels:
        visual = list(reference.projector(reference.vision(torch.from_numpy(np.stack(pixels)))))
    remaining = iter(visual)
    return [reference.embed(row.ids, [next(remaining) for _ in row.sample.images]) for row in group]
