"""Effect of a change of weights on a model's answers (needs torch).

All samples pass the float32 reference layer by layer. A change in a layer runs that layer and those
after it, from the states that the samples reach unchanged. Memory holds the weights of two layers,
and the states of as many changes as fit into ``STATE_BYTES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration.samples import (
    Sample,
    answer_ids,
    sample_images,
    sample_pieces,
)
from mobilevlm.export.calibration.statistics import check_decoder_only, sample_groups
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.linear_groups import LinearGroup, linear_groups
from mobilevlm.model import Model
from mobilevlm.prompt import count_rows, visual_positions
from mobilevlm.reference import load_reference
from mobilevlm.reference.model import fill_block, held
from mobilevlm.reference.steps import State, Step
from mobilevlm.reference.streaming import stream_step

STATE_BYTES = 1 << 28
MAX_LOGITS = 1 << 26
"""Most logits of all samples together: positions times vocabulary."""


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
    """Effect of a change, against the float32 model."""

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
_States: TypeAlias = list[State]
"""After a step: of each run of the encoder, and behind the projector of each sample."""


class Probe:
    """A float32 model and what it answers to samples. Several changes can be tried on it.

    Samples beyond ``MAX_POSITIONS`` of the decoder (export/calibration/statistics.py) or
    ``MAX_LOGITS`` are left out.

    Raises:
        PromptError: a sample does not fit into the context.
        ImageError: an image cannot be read.
        MobileVLMError: the model's logits are infinite or no numbers.
    """

    def __init__(self, model: Model, samples: Sequence[Sample]) -> None:
        check_decoder_only(model.spec, "measuring single layers")
        self._spec, self._weights = model.spec, model.weights
        self._reference = load_reference(model, streamed=True)
        used = _usable_samples(model, samples)
        self.num_samples = len(used)
        self._answers = [answer_positions(model, sample) for sample in used]
        self.num_positions = sum(self._answers)
        self._groups = list(linear_groups(model.spec))
        self._templates, self._places = self._embed_texts(model, used)
        images = [image for sample in used for image in sample_images(model, sample)]
        self._assemblies = [(len(image.arrays), image.assembly) for image in images]
        runs = chain.from_iterable(image.arrays for image in images)
        self._start = list(map(self._reference.image_state, runs))
        del images
        before = [*self._reference.vision_steps(), *self._reference.projector_steps()]
        self._steps = [*before, *self._reference.decoder_steps(), self._head()]
        self._last_before = len(before) - 1
        self._visual: _States = []
        states = self._start
        for index in range(len(self._steps)):
            states = self._run(index, states)
            if index == self._last_before:
                self._visual = states
        self._logits = states
        if not all(bool(state.hidden.isfinite().all()) for state in states):
            raise MobileVLMError(
                "sensitivity: the model's logits are infinite or no numbers: the checkpoint may be "
                "damaged"
            )
        squares = sum(float(state.hidden.double().square().sum()) for state in self._visual)
        self._visual_norm = squares**0.5

    def effects(self, changes: Changes) -> Iterator[tuple[LinearGroup, str, Effect]]:
        """The effect of each change alone, with its group and label."""
        before = self._start
        for index, step in enumerate(self._steps):
            with self._loaded(step):
                after = self._run(index, before)
                labels: list[tuple[LinearGroup, str]] = []
                states: list[_States] = []
                for group in self._groups_of(step):
                    for change in changes(group):
                        with _replaced(step, [(group, change.weight), *change.also]):
                            states.append(self._run(index, before))
                        labels.append((group, change.label))
                        if sum(map(_bytes, states)) + _bytes(states[-1]) > STATE_BYTES:
                            yield from self._compared(index, labels, states)
                            labels, states = [], []
                yield from self._compared(index, labels, states)
            before = after

    def joint_effect(self, replacement: Replacement) -> Effect:
        """The effect of all replaced weights together."""
        states, error = self._start, None
        for index, step in enumerate(self._steps):
            with self._loaded(step):
                for group in self._groups_of(step):
                    weight = replacement(group)
                    if weight is not None:
                        _put(step, group, weight)
                states = self._run(index, states)
            if index == self._last_before:
                error = self._visual_error(states)
        return self._effect(states, error)

    @contextmanager
    def _loaded(self, step: Step) -> Iterator[None]:
        """A step's weights are in memory while the block runs."""
        with held(step.module):
            fill_block(step.module, self._weights, step.name)
            yield

    def _groups_of(self, step: Step) -> Iterator[LinearGroup]:
        return (group for group in self._groups if f"{group.name}.".startswith(f"{step.name}."))

    def _run(self, index: int, states: _States) -> _States:
        """Return the states after a step of this index."""
        after = self._embed(states) if index == self._last_before + 1 else list(states)
        stream_step(self._steps[index], after)
        return after

    def _embed(self, states: _States) -> _States:
        """Return the decoder's state of each sample; ``states``: of the encoder's runs."""
        runs, reference = iter(states), self._reference
        images = [
            reference.rows_of(list(islice(runs, count)), assembly)
            for count, assembly in self._assemblies
        ]
        nothing = self._templates[0].hidden[0, :0]
        visual = torch.cat([nothing, *(image.tokens for image in images)])
        names = [f"deep.{layer}" for layer in self._spec.decoder.deep_layers]
        deep = [
            torch.cat([nothing, *(image.deep[index] for image in images)])
            for index in range(len(names))
        ]
        embedded = []
        for template, places, answers in zip(
            self._templates, self._places, self._answers, strict=True
        ):
            embeds, count = template.hidden.clone(), int(places.sum())
            embeds[:, places], visual = visual[:count], visual[count:]
            length = embeds.shape[1]
            answer = torch.arange(length - answers, length)
            given = {}
            for index, name in enumerate(names if count else ()):
                given[name] = torch.zeros_like(embeds)
                given[name][:, places], deep[index] = deep[index][:count], deep[index][count:]
            embedded.append(template.then(embeds, answer=answer, **given))
        return embedded

    def _head(self) -> Step:
        """Return the step to the logits of the answer."""
        decoder = self._reference.decoder
        return Step(
            "decoder.lm_head",
            decoder.lm_head,
            lambda state: state.then(decoder.logits(state.hidden[0, state.given["answer"]])),
        )

    @torch.no_grad()
    def _embed_texts(self, model: Model, samples: Sequence[Sample]) -> tuple[_States, list[Tensor]]:
        """Return the decoder's state of each sample with nothing where its visual tokens go, and a
        mask of these places ``(length,)``."""
        templates, places = [], []
        with held(self._reference.decoder.embed_tokens):
            for sample in samples:
                pieces = sample_pieces(model, sample)
                blank = torch.zeros(count_rows(pieces), self._spec.decoder.hidden_size)
                templates.append(self._reference.prompt(pieces, [blank]))
                places.append(torch.from_numpy(visual_positions(pieces)))
        return templates, places

    def _compared(
        self, index: int, labels: list[tuple[LinearGroup, str]], states: list[_States]
    ) -> Iterator[tuple[LinearGroup, str, Effect]]:
        """Runs the steps after this one, and compares what comes out."""
        errors: list[float | None] = [None] * len(states)
        for number, step in enumerate(self._steps[index:], index):
            if number > index and states:
                with self._loaded(step):
                    states = [self._run(number, state) for state in states]
            if number == self._last_before:
                errors = [self._visual_error(state) for state in states]
        for (group, label), state, error in zip(labels, states, errors, strict=True):
            yield group, label, self._effect(state, error)

    def _visual_error(self, states: _States) -> float:
        squares = sum(
            float((found.hidden - exact.hidden).double().square().sum())
            for found, exact in zip(states, self._visual, strict=True)
        )
        return float(squares**0.5 / self._visual_norm) if self._visual_norm else 0.0

    def _effect(self, states: _States, visual_error: float | None) -> Effect:
        divergence = agreement = 0.0
        for found, exact in zip(states, self._logits, strict=True):
            ours, theirs = exact.hidden, found.hidden
            p, q = ours.double().log_softmax(dim=-1), theirs.double().log_softmax(dim=-1)
            divergence += float((p.exp() * (p - q)).sum())
            agreement += float((theirs.argmax(dim=-1) == ours.argmax(dim=-1)).sum())
        count = self.num_positions
        return Effect(max(divergence, 0.0) / count, agreement / count, visual_error)


def _bytes(states: _States) -> int:
    return sum(state.hidden.nbytes for state in states)


def _put(step: Step, group: LinearGroup, weight: Float32) -> None:
    """Gives the layers of a group these weights ``(out_size, in_size)``."""
    parts = np.split(weight, np.cumsum(group.out_sizes)[:-1])
    for name, part in zip(group.names, parts, strict=True):
        layer = step.module.get_submodule(name[len(step.name) + 1 :])
        layer.weight = nn.Parameter(torch.from_numpy(part), requires_grad=False)


@contextmanager
def _replaced(step: Step, changed: Sequence[tuple[LinearGroup, Float32]]) -> Iterator[None]:
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
