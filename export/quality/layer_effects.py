"""Effect of each layer of an artifact: its weights alone are put into the reference (needs
torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from mobilevlm.checkpoint import Weights
from mobilevlm.console import progress
from mobilevlm.export.calibration.reference_states import decoder_states, image_states
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.quality.limits import StageKind
from mobilevlm.export.quality.sensitivity import Change, Effect, Probe
from mobilevlm.export.quantize.errors import stacked, weight_error
from mobilevlm.linear_groups import LinearGroup, linear_groups
from mobilevlm.model import Model
from mobilevlm.reference import load_reference
from mobilevlm.reference.steps import State, Step
from mobilevlm.reference.streaming import stream_step
from mobilevlm.spec import ModelSpec

ALL_WEIGHTS = 2e7
"""Weights of a model whose layers are all tried; of a larger one only those that were rounded
most."""
TRIED = 8
"""Layers of each stage that are tried there."""


@dataclass(frozen=True)
class LayerEffect:
    """A layer of an artifact, or layers that are one product."""

    names: tuple[str, ...]
    weight_error: float
    """Relative, of the weights"""
    effect: Effect | None
    """Effect of these weights alone, all others being exact; none where that was not tried"""

    @property
    def label(self) -> str:
        """``decoder.layers.0.attn.q_proj+k_proj+v_proj``"""
        return "+".join((self.names[0], *(name.rpartition(".")[2] for name in self.names[1:])))

    @property
    def is_vision(self) -> bool:
        return not self.names[0].startswith("decoder.")


@dataclass(frozen=True)
class StateError:
    """Relative error of the states after a layer, with the artifact's weights up to there."""

    layer: str
    error: float


def weight_errors(exact: Weights, stored: Weights, spec: ModelSpec) -> dict[str, float]:
    """Relative error of each group of linear layers, by its name."""
    return {group.name: weight_error(exact, stored, group) for group in linear_groups(spec)}


def layer_effects(
    model: Model, stored: Weights, samples: Sequence[Sample], everything: bool = False
) -> list[LayerEffect]:
    """All layers in the order of use. ``stored``: the artifact's weights. ``everything``: try them
    all where the model is small (``ALL_WEIGHTS``), else those that were rounded most, and the head,
    whose errors nothing behind it dampens."""
    groups = list(linear_groups(model.spec))
    errors = weight_errors(model.weights, stored, model.spec)
    tried = {name for name, error in errors.items() if error > 0}
    if not everything or sum(group.size for group in groups) > ALL_WEIGHTS:
        tried = {
            name
            for prefixes in (("vision.", "audio.", "projector."), "decoder.")
            for name in sorted(
                (name for name in tried if name.startswith(prefixes)),
                key=errors.__getitem__,
                reverse=True,
            )[:TRIED]
        } | ({"decoder.lm_head"} & tried)

    def changes(group: LinearGroup) -> list[Change]:
        if group.name not in tried:
            return []
        return [Change("artifact", stacked(stored, group))]

    probe = Probe(model, samples)
    effects = {}
    with progress.track("layers", len(tried)) as advance:
        for group, _, effect in probe.effects(changes):
            effects[group.name] = effect
            advance(1)
    return [
        LayerEffect(group.names, errors[group.name], effects.get(group.name)) for group in groups
    ]


def worst_layers(effects: Sequence[LayerEffect]) -> dict[StageKind, str]:
    """For each stage what to say of the layer that hurts most there."""
    tried = [item for item in effects if item.effect is not None]
    vision = [item for item in tried if item.is_vision]
    decoder = [item for item in tried if not item.is_vision]
    reasons: dict[StageKind, str] = {}
    if vision:
        worst = max(vision, key=_visual_error)
        reasons["vision"] = _reason(worst, f"visual tokens {_visual_error(worst):.2%} off")
    by_kl: tuple[tuple[StageKind, list[LayerEffect]], ...] = (
        ("decoder", decoder),
        ("end_to_end", tried),
    )
    for kind, among in by_kl:
        if among:
            worst = max(among, key=_kl)
            reasons[kind] = _reason(worst, f"kl {_kl(worst):.4g}")
    return reasons


def state_errors(model: Model, stored: Weights, samples: Sequence[Sample]) -> list[StateError]:
    """Errors after each step of the tower and of the decoder that has linear layers; the decoder is
    given the reference's visual tokens. ``stored``: the artifact's weights."""
    exact = load_reference(model, streamed=True)
    found = load_reference(dataclasses.replace(model, weights=stored), streamed=True)
    errors: list[StateError] = []
    images = list(image_states(model, exact, samples))
    if images:
        errors += _state_errors(exact.vision_steps(), found.vision_steps(), images)
    states = decoder_states(model, exact, samples)
    return [*errors, *_state_errors(exact.decoder_steps(), found.decoder_steps(), states)]


def _state_errors(
    exact: Iterable[Step], found: Iterable[Step], states: Sequence[State]
) -> Iterator[StateError]:
    """Yield the error after each step that has linear layers."""
    ours, theirs = list(states), list(states)
    for step, other in zip(exact, found, strict=True):
        stream_step(step, ours)
        stream_step(other, theirs)
        if any(isinstance(module, nn.Linear) for module in step.module.modules()):
            pairs = [(a.hidden, b.hidden) for a, b in zip(ours, theirs, strict=True)]
            error = sum(float((a - b).double().square().sum()) for a, b in pairs)
            norm = sum(float(a.double().square().sum()) for a, _ in pairs)
            yield StateError(step.name, (error / norm) ** 0.5)


def _kl(item: LayerEffect) -> float:
    assert item.effect is not None
    return item.effect.kl


def _visual_error(item: LayerEffect) -> float:
    assert item.effect is not None and item.effect.visual_error is not None
    return item.effect.visual_error


def _reason(item: LayerEffect, effect: str) -> str:
    return f"{item.label} hurts most (alone {effect}, weights {item.weight_error:.1%} off): "
