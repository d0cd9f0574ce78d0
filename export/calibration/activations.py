"""Statistics of the inputs of the tower's linear layers on calibration data, and states of the
reference on samples (needs torch).

All samples pass the float32 reference step by step: memory holds one step's weights, its
statistics, and the states between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration import statistics
from mobilevlm.export.calibration.samples import (
    Sample,
    sample_arrays,
    sample_images,
    sample_pieces,
)
from mobilevlm.export.calibration.statistics import Block, Sums, Wanted, finished
from mobilevlm.model import Model
from mobilevlm.prompt import Arrays
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.reference.assembly import assemble_rows
from mobilevlm.reference.model import held
from mobilevlm.reference.steps import State, Step
from mobilevlm.reference.streaming import stream_step, stream_steps


def watch_vision(
    model: Model, samples: Sequence[Sample], wanted: Wanted, hessian: bool
) -> Iterator[Block]:
    """Statistics of the tower's layers and the projector, in the order of use.

    ``wanted``: the layers to watch. ``hessian``: with the second moments, which take the square of
    a layer's input size.

    Raises:
        MobileVLMError: no sample has a picture; an activation is infinite or no number.
        ImageError: a picture cannot be read.
    """
    reference = load_reference(model, streamed=True)
    arrays = _usable_arrays(model, samples)
    if not arrays:
        raise MobileVLMError("calibration: no sample has a picture, the tower needs some")
    states = [reference.image_state(item) for item in arrays]
    del arrays
    steps = (*reference.vision_steps(), *reference.projector_steps())
    yield from _watch_steps(steps, states, wanted, hessian)


def _watch_steps(
    steps: Iterable[Step], states: list[State], wanted: Wanted, hessian: bool
) -> Iterator[Block]:
    """Run steps on all samples, whose states are replaced; yield the statistics of each step that
    has wanted layers."""
    for step in steps:
        layers = {
            name: module
            for name, module in step.module.named_modules(prefix=step.name)
            if isinstance(module, nn.Linear) and wanted(name)
        }
        if layers:
            yield _watch_step(step, layers, states, hessian)
        else:
            stream_step(step, states)


def _watch_step(
    step: Step, layers: Mapping[str, nn.Module], states: list[State], hessian: bool
) -> Block:
    """Run a step on all samples and watch these layers, by their names. Layers that are given the
    same tensor share its statistics."""
    sums: dict[str, Sums] = {}
    last: tuple[Tensor, Sums] | None = None

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal last
            if last is not None and last[0] is inputs[0]:
                sums[name] = last[1]
                return
            found = sums.setdefault(name, Sums(hessian))
            found.add(inputs[0].numpy())
            last = (inputs[0], found)

        return add

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        stream_step(step, states)
    return finished(sums)


def _usable_arrays(model: Model, samples: Sequence[Sample]) -> list[Arrays]:
    """Inputs of the encoder, as many as there is room for."""
    room = max(1, statistics.MAX_POSITIONS // model.spec.image.encoder.num_positions)
    found = list(islice(sample_arrays(model, samples), room + 1))
    if len(found) > room:
        count = sum(len(sample.images) for sample in samples)
        progress.say(f"calibration the tower sees {room} images of the samples' {count}")
    return found[:room]


def image_states(
    model: Model, reference: ReferenceModel, samples: Sequence[Sample]
) -> Iterator[State]:
    """Yield the state before the reference's first step, of each run of the encoder."""
    return map(reference.image_state, sample_arrays(model, samples))


def exact_images(
    model: Model, reference: ReferenceModel, samples: Sequence[Sample]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the reference's features and visual tokens of each image."""
    images = [image for sample in samples for image in sample_images(model, sample)]
    arrays = chain.from_iterable(image.arrays for image in images)
    states = stream_steps(reference.vision_steps(), map(reference.image_state, arrays))
    features = iter([state.hidden[0] for state in states])
    projected = stream_steps(reference.projector_steps(), states)
    tokens = iter([state.hidden[0] for state in projected])
    for image in images:
        seen = [(next(features), next(tokens)) for _ in image.arrays]
        rows = assemble_rows([part for _, part in seen], image.assembly)
        yield torch.cat([part for part, _ in seen]), rows


@torch.no_grad()
def decoder_states(
    model: Model, reference: ReferenceModel, samples: Sequence[Sample]
) -> list[State]:
    """Return the state of each sample, with its answer, before the decoder's first step."""
    images = exact_images(model, reference, samples)
    with held(reference.decoder.embed_tokens):
        return [
            reference.decoder.start(
                reference.embed(
                    sample_pieces(model, sample), [next(images)[1] for _ in sample.images]
                )[None]
            )
            for sample in samples
        ]
