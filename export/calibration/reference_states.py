"""States of the float32 reference on samples, which pass it step by step (needs torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from mobilevlm.export.calibration.samples import (
    Sample,
    sample_arrays,
    sample_images,
    sample_pieces,
)
from mobilevlm.model import Model
from mobilevlm.reference import ReferenceModel
from mobilevlm.reference.model import ImageRows, held
from mobilevlm.reference.steps import State
from mobilevlm.reference.streaming import stream_steps


def image_states(
    model: Model, reference: ReferenceModel, samples: Sequence[Sample]
) -> Iterator[State]:
    """Yield the state before the reference's first step, of each run of the encoder."""
    return map(reference.image_state, sample_arrays(model, samples))


def exact_images(
    model: Model, reference: ReferenceModel, samples: Sequence[Sample]
) -> Iterator[tuple[Tensor, ImageRows]]:
    """Yield the reference's features and rows of each image."""
    images = [image for sample in samples for image in sample_images(model, sample)]
    arrays = chain.from_iterable(image.arrays for image in images)
    states = stream_steps(reference.vision_steps(), map(reference.image_state, arrays))
    features = iter([state.hidden[0] for state in states])
    projected = iter(stream_steps(reference.projector_steps(), states))
    for image in images:
        seen = [(next(features), next(projected)) for _ in image.arrays]
        rows = reference.rows_of([state for _, state in seen], image.assembly)
        yield torch.cat([part for part, _ in seen]), rows


@torch.no_grad()
def decoder_states(
    model: Model, reference: ReferenceModel, samples: Sequence[Sample]
) -> list[State]:
    """Return the state of each sample, with its answer, before the decoder's first step."""
    images = exact_images(model, reference, samples)
    with held(reference.decoder.embed_tokens):
        return [
            reference.prompt(sample_pieces(model, sample), [next(images)[1] for _ in sample.images])
            for sample in samples
        ]
