"""What the inputs of linear layers look like on calibration data (needs torch).

All samples pass the float32 reference step by step: memory holds one step's weights, its
statistics, and the states between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError, PromptError
from mobilevlm.export.calibration.samples import (
    Sample,
    sample_arrays,
    sample_images,
    sample_pieces,
)
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.export.quantize.rotation import Rotation
from mobilevlm.model import Model
from mobilevlm.prompt import Arrays, count_positions
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.reference.assembly import assemble_rows
from mobilevlm.reference.model import held
from mobilevlm.reference.steps import State, Step
from mobilevlm.reference.streaming import stream_step, stream_steps
from mobilevlm.spec import ModelSpec

MAX_POSITIONS = 1 << 14
"""Of all samples together, in the tower or in the decoder: a layer's inputs stay in memory."""

Wanted: TypeAlias = Callable[[str], bool]


@dataclass(frozen=True)
class InputStatistics:
    """Of the inputs of one linear layer over all tokens that reached it."""

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


class _Sums:
    """Adds up the inputs of one linear layer."""

    def __init__(self, hessian: bool) -> None:
        self.count = 0
        self.maximum = self.squares = torch.zeros(1)
        self.products = torch.zeros(1) if hessian else None

    def add(self, inputs: Tensor) -> None:
        """``(…, in_size)``"""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if not len(rows):
            return  # an expert that no token chose
        self.count += len(rows)
        self.maximum = torch.maximum(self.maximum, rows.abs().amax(dim=0))
        self.squares = self.squares + rows.double().square().sum(dim=0)
        if self.products is not None:
            if self.products.ndim == 1:
                self.products = torch.zeros(rows.shape[1], rows.shape[1])
            self.products.addmm_(rows.T, rows)

    def finish(self) -> InputStatistics:
        if not self.count:
            return InputStatistics(0, np.zeros(0, np.float32), np.zeros(0, np.float32), None)
        hessian = None if self.products is None else self.products.div_(self.count).numpy()
        mean_square = (self.squares / self.count).float().numpy()
        return InputStatistics(self.count, self.maximum.numpy(), mean_square, hessian)


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


def watch_decoder(
    model: Model,
    samples: Sequence[Sample],
    wanted: Wanted,
    hessian: bool,
    stream: Rotation | None = None,
) -> Iterator[Block]:
    """The same for the decoder's layers and its head. ``stream``: rotation that the model's weights
    are for.

    Raises:
        PromptError: a sample does not fit into the context.
        ImageError: a picture cannot be read.
        MobileVLMError: an activation is infinite or no number.
    """
    check_decoder_only(model.spec, "calibration")
    reference = load_reference(model, streamed=True)
    used = next(sample_groups(model, samples))
    if len(used) < len(samples):
        progress.say(f"calibration the decoder sees {len(used)} of {len(samples)} samples")
    states = decoder_states(model, reference, used)
    if stream is not None:
        states = [_rotated(state, stream) for state in states]
    yield from _watch_steps(reference.decoder_steps(), states, wanted, hessian)
    if wanted("decoder.lm_head"):
        sums = _Sums(hessian)
        for state in states:
            sums.add(state.hidden)
        yield _finished({"decoder.lm_head": sums})


def _rotated(state: State, stream: Rotation) -> State:
    """The state before the decoder's first step for a rotated stream."""
    rows = {name: rows for name, rows in state.given.items() if name.startswith("deep.")}
    rows["hidden"] = state.hidden
    turned = {name: torch.from_numpy(stream.of_inputs(part.numpy())) for name, part in rows.items()}
    return state.then(turned.pop("hidden"), **turned)


def check_decoder_only(spec: ModelSpec, purpose: str) -> None:
    """Raises MobileVLMError: the model has an encoder, through which samples are not run here."""
    if spec.decoder.encoder_layers:
        raise MobileVLMError(
            f"{purpose} is for decoder-only language models, that of {spec.name} has an encoder"
        )


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
    sums: dict[str, _Sums] = {}
    last: tuple[Tensor, _Sums] | None = None

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal last
            if last is not None and last[0] is inputs[0]:
                sums[name] = last[1]
                return
            found = sums.setdefault(name, _Sums(hessian))
            found.add(inputs[0])
            last = (inputs[0], found)

        return add

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        stream_step(step, states)
    return _finished(sums)


def _finished(sums: dict[str, _Sums]) -> Block:
    """Each once, also where layers share it."""
    done = {id(item): item.finish() for item in {id(item): item for item in sums.values()}.values()}
    for name, item in sums.items():
        if not np.isfinite(done[id(item)].mean_square).all():
            raise MobileVLMError(
                f"calibration: inputs of {name!r} are infinite or no numbers: the checkpoint may "
                f"be damaged"
            )
    return {name: done[id(item)] for name, item in sums.items()}


def _usable_arrays(model: Model, samples: Sequence[Sample]) -> list[Arrays]:
    """Inputs of the encoder, as many as there is room for."""
    room = max(1, MAX_POSITIONS // model.spec.image.encoder.num_positions)
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
