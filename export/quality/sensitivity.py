"""What a change of weights does to a model's answers (needs torch).

All samples pass the float32 reference layer by layer. A change in a layer runs that layer and those
after it, from the states that the samples reach unchanged. Memory holds the weights of two layers,
and the states of as many changes as fit into ``STATE_BYTES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration.activations import (
    check_decoder_only,
    embed_images,
    run_decoder_layer,
    sample_groups,
)
from mobilevlm.export.calibration.samples import Sample, answer_ids, sample_arrays, sample_pieces
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.linear_groups import LinearGroup, linear_groups
from mobilevlm.model import Model
from mobilevlm.prompt import count_rows, visual_positions
from mobilevlm.reference import load_reference
from mobilevlm.reference.model import fill_block, held

STATE_BYTES = 1 << 28
MAX_LOGITS = 1 << 26
"""Of all samples together: positions times vocabulary."""


@dataclass(frozen=True)
class Change:
    """Other weights for the layers of a group."""

    label: str
    """Tells the changes of a group apart."""
    weight: Float32
    """Stacked, ``(out_size, in_size)``"""
    also: tuple[tuple[LinearGroup, Float32], ...] = ()
    """Groups of the same layer that change with it, and their weights."""


@dataclass(frozen=True)
class Effect:
    """What a change does, against the float32 model."""

    kl: float
    """Mean Kullback–Leibler divergence of the next-token distributions where the model answers:
    from the end of the prompt to the end of the answer. In nats."""
    top1_agreement: float
    """Share of these positions with the same likeliest token."""
    visual_error: float | None
    """Relative error of the visual tokens, as a ratio of Euclidean norms; none after them."""


Changes: TypeAlias = Callable[[LinearGroup], Iterable[Change]]
"""The changes to try on a group; asked in the order of use, one change at a time."""
Replacement: TypeAlias = Callable[[LinearGroup], Float32 | None]
"""Stacked weights ``(out_size, in_size)`` for a group, none to leave it as it is."""
_State: TypeAlias = list[Tensor]
"""What has become of each sample after a step."""


@dataclass(frozen=True)
class _Step:
    """A part of the model that runs with all its weights in memory."""

    name: str
    module: nn.Module
    run: Callable[[int, Tensor], Tensor]
    """From the number of a sample and its state to its next state."""


class Probe:
    """A float32 model and what it answers to samples. Several changes can be tried on it.

    Samples beyond ``MAX_POSITIONS`` of the decoder (export/calibration/activations.py) or
    ``MAX_LOGITS`` are left out.

    Raises:
        PromptError: a sample does not fit into the context.
        ImageError: a picture cannot be read.
        MobileVLMError: the model's logits are infinite or no numbers.
    """

    def __init__(self, model: Model, samples: Sequence[Sample]) -> None:
        check_decoder_only(model.spec, "measuring single layers")
        self._spec, self._weights = model.spec, model.weights
        self._reference = load_reference(model, streamed=True)
        used = _usable_samples(model, samples)
        self.num_samples = len(used)
        self._answers = [answer_positions(model, sample) for sample in used]
        self._arrays = [list(sample_arrays(model, [sample])) for sample in used]
        self.num_positions = sum(self._answers)
        self._groups = list(linear_groups(model.spec))
        with torch.no_grad():
            self._templates, self._places = self._embed_texts(model, used)
            self._start = [
                torch.cat(embed_images(self._reference, arrays)) if arrays else torch.empty(0)
                for arrays in self._arrays
            ]
            self._steps = self._make_steps()
            self._embeds: _State = []
            state = self._start
            for step in self._steps:
                if step.name == "decoder.layers.0":
                    self._embeds = state
                with self._loaded(step):
                    state = _run(step, state)
            self._logits = state
        if not all(bool(item.isfinite().all()) for item in state):
            raise MobileVLMError(
                "sensitivity: the model's logits are infinite or no numbers: the checkpoint may be "
                "damaged"
            )
        visual = torch.cat(
            [item[0][place] for item, place in zip(self._embeds, self._places, strict=True)]
        )
        self._visual_norm = float(visual.norm())

    def effects(self, changes: Changes) -> Iterator[tuple[LinearGroup, str, Effect]]:
        """The effect of each change alone, with its group and label."""
        state = self._start
        for index, step in enumerate(self._steps):
            with self._loaded(step):
                after = _run(step, state)
                labels: list[tuple[LinearGroup, str]] = []
                states: list[_State] = []
                for group in self._groups_of(step):
                    for change in changes(group):
                        with _replaced(step, [(group, change.weight), *change.also]):
                            states.append(_run(step, state))
                        labels.append((group, change.label))
                        if sum(map(_bytes, states)) + _bytes(states[-1]) > STATE_BYTES:
                            yield from self._compared(index, labels, states)
                            labels, states = [], []
                yield from self._compared(index, labels, states)
            state = after

    def joint_effect(self, replacement: Replacement) -> Effect:
        """The effect of all replaced weights together."""
        state, error = self._start, None
        for step in self._steps:
            with self._loaded(step):
                for group in self._groups_of(step):
                    weight = replacement(group)
                    if weight is not None:
                        _put(step, group, weight)
                state = _run(step, state)
            if step.name == "projector":
                error = self._visual_error(state)
        return self._effect(state, error)

    @contextmanager
    def _loaded(self, step: _Step) -> Iterator[None]:
        """A step's weights are in memory while the block runs."""
        with held(step.module):
            fill_block(step.module, self._weights, step.name)
            yield

    def _groups_of(self, step: _Step) -> Iterator[LinearGroup]:
        return (group for group in self._groups if f"{group.name}.".startswith(f"{step.name}."))

    def _make_steps(self) -> list[_Step]:
        reference, spec = self._reference, self._spec
        tower, decoder = reference.vision, reference.decoder

        def project(number: int, state: Tensor) -> Tensor:
            embeds = self._templates[number].clone()
            if len(state):
                tokens = reference.project(tower.features(state), self._arrays[number][0])
                embeds[self._places[number]] = tokens.flatten(0, 1)
            return embeds[None]

        def head(number: int, state: Tensor) -> Tensor:
            logits: Tensor = decoder.logits(state[0, -self._answers[number] :])
            return logits

        def tower_layer(layer: nn.Module) -> Callable[[int, Tensor], Tensor]:
            return lambda _, state: layer(state) if len(state) else state

        def decoder_layer(index: int, layer: nn.Module) -> Callable[[int, Tensor], Tensor]:
            def run(number: int, state: Tensor) -> Tensor:
                state = state if index else decoder.begin(state)
                return run_decoder_layer(layer, spec.decoder, state)

            return run

        return [
            *(
                _Step(f"vision.layers.{index}", layer, tower_layer(layer))
                for index, layer in enumerate(tower.layers)
            ),
            _Step("projector", reference.projector, project),
            *(
                _Step(f"decoder.layers.{index}", layer, decoder_layer(index, layer))
                for index, layer in enumerate(decoder.layers)
            ),
            _Step("decoder.lm_head", decoder.lm_head, head),
        ]

    def _embed_texts(
        self, model: Model, samples: Sequence[Sample]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings ``(length, hidden_size)`` of each sample with nothing where its visual tokens
        go, and a mask of these places ``(length,)``."""
        templates, places = [], []
        with held(self._reference.decoder.embed_tokens):
            for sample in samples:
                pieces = sample_pieces(model, sample)
                blank = torch.zeros(count_rows(pieces), self._spec.decoder.hidden_size)
                templates.append(self._reference.embed(pieces, [blank]))
                places.append(torch.from_numpy(visual_positions(pieces)))
        return templates, places

    def _compared(
        self, index: int, labels: list[tuple[LinearGroup, str]], states: list[_State]
    ) -> Iterator[tuple[LinearGroup, str, Effect]]:
        """Runs the steps after this one, and compares what comes out."""
        errors: list[float | None] = [None] * len(states)
        for number, step in enumerate(self._steps[index:], index):
            if number > index and states:
                with self._loaded(step):
                    states = [_run(step, state) for state in states]
            if step.name == "projector":
                errors = [self._visual_error(state) for state in states]
        for (group, label), state, error in zip(labels, states, errors, strict=True):
            yield group, label, self._effect(state, error)

    def _visual_error(self, state: _State) -> float:
        squares = sum(
            float((found - exact).double().square().sum())
            for found, exact in zip(state, self._embeds, strict=True)
        )
        return float(squares**0.5 / self._visual_norm) if self._visual_norm else 0.0

    def _effect(self, state: _State, visual_error: float | None) -> Effect:
        divergence = agreement = 0.0
        for found, exact in zip(state, self._logits, strict=True):
            p, q = exact.double().log_softmax(dim=-1), found.double().log_softmax(dim=-1)
            divergence += float((p.exp() * (p - q)).sum())
            agreement += float((found.argmax(dim=-1) == exact.argmax(dim=-1)).sum())
        count = self.num_positions
        return Effect(max(divergence, 0.0) / count, agreement / count, visual_error)


@torch.no_grad()
def _run(step: _Step, state: _State) -> _State:
    return [step.run(number, item) for number, item in enumerate(state)]


def _bytes(state: _State) -> int:
    return sum(item.nbytes for item in state)


def _put(step: _Step, group: LinearGroup, weight: Float32) -> None:
    """Gives the layers of a group these weights ``(out_size, in_size)``."""
    parts = np.split(weight, np.cumsum(group.out_sizes)[:-1])
    for name, part in zip(group.names, parts, strict=True):
        layer = step.module.get_submodule(name[len(step.name) + 1 :])
        layer.weight = nn.Parameter(torch.from_numpy(part), requires_grad=False)


@contextmanager
def _replaced(step: _Step, changed: Sequence[tuple[LinearGroup, Float32]]) -> Iterator[None]:
    """Other weights while the block runs; the step's own are in memory."""
    names = [name for group, _ in changed for name in group.names]
    layers = [step.module.get_submodule(name[len(step.name) + 1 :]) for name in names]
    own = [layer.weight for layer in layers]
    for group, weight in changed:
        _put(step, group, weight)
    try:
        yield
    finally:
        for layer, parameter in zip(layers, own, strict=True):
            layer.weight = parameter


def _usable_samples(model: Model, samples: Sequence[Sample]) -> list[Sample]:
    """As many as there is room for."""
    used: list[Sample] = []
    positions = 0
    for sample in next(sample_groups(model, samples)):
        positions += answer_positions(model, sample)
        if used and positions * model.spec.decoder.vocab_size > MAX_LOGITS:
            break
        used.append(sample)
    if len(used) < len(samples):
        progress.say(f"sensitivity {len(used)} of {len(samples)} samples are used")
    return used


def answer_positions(model: Model, sample: Sample) -> int:
    """Positions at the end of a sample that predict its answer and what comes after."""
    return len(answer_ids(model, sample)) + 1
