"""Statistics of what linear layers are given, and the samples that they are taken from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mobilevlm.errors import MobileVLMError, PromptError
from mobilevlm.export.calibration.samples import Sample, sample_pieces
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.model import Model
from mobilevlm.prompt import count_positions
from mobilevlm.spec import ModelSpec

MAX_POSITIONS = 1 << 14
"""Most positions of all samples in the tower or in the decoder: a layer's inputs stay in memory."""
_TOGETHER = 4096
"""Rows that are multiplied at once for a Hessian; fewer take longer."""

Wanted: TypeAlias = Callable[[str], bool]


@dataclass(frozen=True)
class InputStatistics:
    """Figures of one linear layer's inputs over all tokens that reached it."""

    count: int
    """Tokens; without any the arrays are empty."""
    maximum: Float32
    """Largest magnitude of each input ``(in_size,)``"""
    mean_square: Float32
    """``(in_size,)``"""
    hessian: Float32 | None
    """``Xᵀ X / count`` ``(in_size, in_size)``, where it was asked for"""


Block: TypeAlias = dict[str, InputStatistics]
"""Statistics of the linear layers of one part of the model, by canonical name."""


class Sums:
    """Adds up the inputs of one linear layer."""

    def __init__(self, hessian: bool) -> None:
        self.count = 0
        self._hessian = hessian
        self._maximum = np.zeros(1, np.float32)
        self._squares = np.zeros(1)
        self._products: Float32 | None = None
        self._rows: list[Float32] = []

    def add(self, inputs: Float32) -> None:
        """``(…, in_size)``"""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if not len(rows):
            return  # an expert that no token chose
        self.count += len(rows)
        self._maximum = np.maximum(self._maximum, np.abs(rows).max(axis=0))
        self._squares = self._squares + np.square(rows, dtype=np.float64).sum(axis=0)
        if self._hessian:
            self._rows.append(rows)
            if sum(map(len, self._rows)) >= _TOGETHER:
                self._multiply()

    def add_figures(
        self, count: int, maximum: Float32, squares: Float32, products: Float32 | None
    ) -> None:
        """Add what was summed up elsewhere over ``count`` tokens; ``products``: ``Xᵀ X``."""
        self.count += count
        self._maximum = np.maximum(self._maximum, maximum)
        self._squares = self._squares + squares
        if products is not None:
            self._products = products if self._products is None else self._products + products

    def finish(self) -> InputStatistics:
        """Return the statistics; nothing can be added after."""
        if not self.count:
            return InputStatistics(0, np.zeros(0, np.float32), np.zeros(0, np.float32), None)
        if self._rows:
            self._multiply()
        if self._products is not None:
            self._products /= np.float32(self.count)
        mean_square = (self._squares / self.count).astype(np.float32)
        return InputStatistics(self.count, self._maximum, mean_square, self._products)

    def _multiply(self) -> None:
        rows = np.concatenate(self._rows)
        self._rows = []
        products = rows.T @ rows
        if self._products is None:
            self._products = products
        else:
            self._products += products


def finished(sums: Mapping[str, Sums]) -> Block:
    """Return the statistics of each layer, made once where layers share them.

    Raises:
        MobileVLMError: an activation is infinite or no number.
    """
    done = {id(item): item.finish() for item in {id(item): item for item in sums.values()}.values()}
    for name, item in sums.items():
        if not np.isfinite(done[id(item)].mean_square).all():
            raise MobileVLMError(
                f"calibration: inputs of {name!r} are infinite or no numbers: the checkpoint may "
                f"be damaged"
            )
    return {name: done[id(item)] for name, item in sums.items()}


def sample_groups(
    model: Model, samples: Sequence[Sample], positions: int | None = None
) -> Iterator[list[Sample]]:
    """The samples in groups of neighbours of so many positions in the decoder, by default
    ``MAX_POSITIONS``; a longer sample is a group of its own.

    Raises:
        PromptError: a sample does not fit into the context.
    """
    group: list[Sample] = []
    limit = positions or MAX_POSITIONS
    room = limit
    for number, sample in enumerate(samples, 1):
        length = count_positions(sample_pieces(model, sample))
        if length > model.spec.decoder.context_length:
            raise PromptError(
                f"calibration sample {number} takes {length} tokens, the context holds "
                f"{model.spec.decoder.context_length}: shorten it"
            )
        if group and length > room:
            yield group
            group, room = [], limit
        group.append(sample)
        room -= length
    yield group


def check_decoder_only(spec: ModelSpec, purpose: str) -> None:
    """Raises MobileVLMError: the model has an encoder, through which samples are not run here."""
    if spec.decoder.encoder_layers:
        raise MobileVLMError(
            f"{purpose} is for decoder-only language models, that of {spec.name} has an encoder"
        )
