"""Use of experts in a sparse model: shares of the choices by layer, expert and modality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mobilevlm.console.progress import Advance, ignore
from mobilevlm.decoder_spec import ExpertsSpec
from mobilevlm.errors import require
from mobilevlm.export.calibration.samples import Sample, sample_pieces, sample_text
from mobilevlm.model import Model
from mobilevlm.prompt import visual_positions
from mobilevlm.runtime.engines import no_experts
from mobilevlm.runtime.sequence.session import PromptChoices
from mobilevlm.runtime.vlm import VLM

if TYPE_CHECKING:
    from mobilevlm.reference import ReferenceModel
    from mobilevlm.reference.experts import SparseMLP


@dataclass(frozen=True)
class LayerUsage:
    """Choices in one sparse layer."""

    layer: int
    visual: tuple[int, ...]
    """Choices at positions of images, by expert"""
    text: tuple[int, ...]

    @property
    def total(self) -> tuple[int, ...]:
        """Choices at all positions, by expert."""
        return tuple(seen + read for seen, read in zip(self.visual, self.text, strict=True))


def shares(counts: Sequence[int]) -> tuple[float, ...]:
    """Return the share of each count in the whole; zeros where nothing was counted."""
    whole = max(sum(counts), 1)
    return tuple(count / whole for count in counts)


def checkpoint_usage(
    model: Model, samples: Sequence[Sample], advance: Advance = ignore
) -> tuple[LayerUsage, ...]:
    """Count the choices of the float32 reference on the samples, answers included (needs torch).
    ``advance`` hears of each sample.

    Raises:
        PromptError: a sample does not fit into the context.
        ImageError: an image cannot be read.
        MobileVLMError: the decoder has no experts.
        MissingExtraError: torch is not installed.
    """
    return _counted(model.spec.decoder.experts, _reference_choices(model, samples), advance)


def bundle_usage(
    vlm: VLM, samples: Sequence[Sample], advance: Advance = ignore
) -> tuple[LayerUsage, ...]:
    """The same of a bundle in the engine that it was loaded in; torch is not needed."""
    choices = (
        vlm.expert_choices(sample_text(vlm.spec, sample), sample.images, raw=True)
        for sample in samples
    )
    return _counted(vlm.spec.decoder.experts, choices, advance)


def _counted(
    experts: ExpertsSpec | None, choices: Iterator[PromptChoices], advance: Advance
) -> tuple[LayerUsage, ...]:
    if experts is None:
        raise no_experts()
    sizes = dict(zip(experts.layers, experts.num_experts, strict=True))
    found = {layer: np.zeros((2, size), np.int64) for layer, size in sizes.items()}
    for sample in choices:
        for layer, chosen in sample.layers.items():
            for row, places in enumerate((sample.is_visual, ~sample.is_visual)):
                found[layer][row] += np.bincount(chosen[places].ravel(), minlength=sizes[layer])
        advance(1)
    return tuple(
        LayerUsage(layer, tuple(visual.tolist()), tuple(text.tolist()))
        for layer, (visual, text) in found.items()
    )


def _reference_choices(model: Model, samples: Sequence[Sample]) -> Iterator[PromptChoices]:
    """Yield the reference's choices for one sample after the other; layers are read once for a
    group of samples."""
    try:
        from mobilevlm.export.calibration.reference_states import decoder_states
        from mobilevlm.export.calibration.statistics import sample_groups
        from mobilevlm.export.quality.measure import POSITIONS
        from mobilevlm.reference import load_reference
        from mobilevlm.reference.streaming import stream_steps
    except ImportError:
        raise require("torch", "reference", "running a checkpoint") from None
    reference = load_reference(model, streamed=True)
    for group in sample_groups(model, samples, POSITIONS):
        states = decoder_states(model, reference, group)
        with _noted(reference) as found:
            stream_steps(reference.decoder_steps(), states)
        for index, sample in enumerate(group):
            layers = {layer: chosen[index] for layer, chosen in found.items()}
            yield PromptChoices(layers, visual_positions(sample_pieces(model, sample)))


@contextmanager
def _noted(reference: ReferenceModel) -> Iterator[dict[int, list[NDArray[np.int64]]]]:
    """Note the choices of each pass through a sparse layer ``(length, top_k)``, by layer."""
    found: dict[int, list[NDArray[np.int64]]] = {}

    def note(layer: int, sparse: SparseMLP, *_: object) -> None:
        found.setdefault(layer, []).append(sparse.chosen.numpy())

    hooks = [
        sparse.register_forward_hook(partial(note, layer))
        for layer, sparse in reference.decoder.sparse_layers.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
